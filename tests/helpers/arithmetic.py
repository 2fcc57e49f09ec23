"""Steps of decoders in numpy, for oracles of families that transformers lacks."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def rotate(x: np.ndarray, frequencies: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """Rope on the first 2 * len(frequencies) features of x [T, heads, size], pairs (i, i + n)."""
    pairs = len(frequencies)
    angles = np.arange(len(x))[:, None, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    a, b, rest = np.split(x, [pairs, 2 * pairs], -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention: q [T, heads, size], k and v [T, kv_heads, size] -> [T, heads * size]."""
    k, v = (np.repeat(each, q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)
