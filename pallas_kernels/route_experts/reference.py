"""The op in jnp, after a product by ``fused_linear``. Runs anywhere, and is the one that knows
groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fused_linear import fused_linear

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
NO_WEIGHT = 1e-20
"""Added to a sum of weights that others are divided by."""


def route_experts(
    x: jax.Array,
    w: jax.Array,
    *,
    top_k: int,
    scores: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    bias: jax.Array | None = None,
    correction: jax.Array | None = None,
    is_token: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.route_experts``."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = fused_linear(x, w, partial=True, out_dtype=wide).sum(0)
    own = SCORES[scores](logits if bias is None else logits + bias)
    wanted = own if correction is None else own + correction
    if groups > 1:
        wanted = _of_best_groups(wanted, groups, top_groups, group_score)
    _, experts = jax.lax.top_k(wanted, top_k)
    weights = jnp.take_along_axis(own, experts, 1)
    if normalize:
        weights = weights / (weights.sum(1, keepdims=True) + NO_WEIGHT)
    if is_token is not None:
        experts = jnp.where(is_token[:, None], experts, -1)
    return experts, weights * scale


def _of_best_groups(wanted: jax.Array, groups: int, top_groups: int, group_score: str) -> jax.Array:
    """Scores [T, E] with those outside of the best groups at minus infinity."""
    grouped = wanted.reshape(wanted.shape[0], groups, -1)
    best, _ = jax.lax.top_k(grouped, 1 if group_score == "max" else 2)
    _, chosen = jax.lax.top_k(best.sum(-1), top_groups)
    kept = jax.nn.one_hot(chosen, groups, dtype=bool).any(1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(wanted.shape)
