"""The op's signature and the order of its implementations."""

from __future__ import annotations

from typing import Literal

import jax

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.route_experts import reference, triton

IMPLEMENTATIONS = {"triton": triton.route_experts, "reference": reference.route_experts}


def route_experts(
    x: jax.Array,
    w: jax.Array,
    *,
    top_k: int,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
    bias: jax.Array | None = None,
    correction: jax.Array | None = None,
    is_token: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The ``top_k`` experts with the highest scores of the logits x w^T + bias.

    Args:
        x: [T, hidden].
        w: [E, hidden].
        top_k: experts per token.
        scores: "softmax" over all experts, or "sigmoid" of each.
        normalize: the chosen scores are divided by their sum.
        scale: multiplies the weights.
        groups, top_groups: experts are chosen among the best ``top_groups`` of ``groups`` groups,
            which are neighbours.
        group_score: a group is as good as its best expert ("max") or its best two together
            ("top2").
        bias: [E].
        correction: [E], added to the scores for the choice, but not to the weights.
        is_token: bool [T], False for padding, which chooses no experts.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        int32 [T, top_k], best first and the lower number first where scores tie; -1 for padding.
        Unspecified for a row with NaN. And their weights, float32 [T, top_k]; padding's are
        unspecified.

    Raises:
        ValueError: shapes don't fit together, or there are fewer experts than a token wants.
        ExceptionGroup: no implementation can run the case.
    """
    count, hidden = w.shape
    if x.shape[1:] != (hidden,):
        raise ValueError(f"x {x.shape} and the weight {w.shape} don't fit together")
    for name, array, size in (
        ("bias", bias, count),
        ("correction", correction, count),
        ("is_token", is_token, x.shape[0]),
    ):
        if array is not None and array.shape != (size,):
            raise ValueError(f"{name} {array.shape} doesn't fit x {x.shape} and w {w.shape}")
    if not 1 <= top_k <= count * top_groups // groups:
        raise ValueError(f"{top_k} of {count} experts in {top_groups} of {groups} groups")
    return dispatch.call(
        "route_experts",
        IMPLEMENTATIONS,
        implementation,
        x,
        w,
        top_k=top_k,
        scores=scores,
        normalize=normalize,
        scale=scale,
        groups=groups,
        top_groups=top_groups,
        group_score=group_score,
        bias=bias,
        correction=correction,
        is_token=is_token,
    )
