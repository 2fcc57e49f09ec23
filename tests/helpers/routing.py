"""How tokens choose experts, in float64 numpy, one token after the other."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def route(
    rule: Any, logits: np.ndarray, correction: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, best first, and their weights, both [T, top_k].

    ``rule`` has ``route_experts``' settings as attributes.
    """
    scores = softmax(logits) if rule.scores == "softmax" else sigmoid(logits)
    experts = np.stack(
        [_chosen(rule, own if correction is None else own + correction) for own in scores]
    )
    weights = np.take_along_axis(scores, experts, 1)
    if rule.normalize:
        weights = weights / weights.sum(1, keepdims=True)
    return experts, weights * rule.scale


def _chosen(rule: Any, wanted: np.ndarray) -> np.ndarray:
    groups = np.split(np.arange(len(wanted)), rule.groups)
    members = 1 if rule.group_score == "max" else 2
    groups.sort(key=lambda group: -np.sort(wanted[group])[-members:].sum())
    allowed = np.sort(np.concatenate(groups[: rule.top_groups]))
    return allowed[np.argsort(-wanted[allowed], kind="stable")[: rule.top_k]]
