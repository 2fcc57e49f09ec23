"""The op in jnp. Runs anywhere; finds each threshold by bisection over the floats' bits, which is
exact and takes 32 passes, whatever k or p is."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.truncation_threshold.bits import from_ordered, to_ordered
from pallas_kernels.truncation_threshold.settings import asked


def truncation_threshold(
    logits: jax.Array, min_p: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """See ``api.truncation_threshold``."""

    def find() -> jax.Array:
        threshold = logits.max(-1) + jnp.log(min_p)
        last = _top_k_threshold(_cut(logits, threshold), top_k)
        threshold = jnp.maximum(threshold, jnp.where(wanted.top_k, last, -jnp.inf))
        last = _top_p_threshold(_cut(logits, threshold), top_p)
        return jnp.maximum(threshold, jnp.where(wanted.top_p, last, -jnp.inf))

    wanted = asked(min_p, top_k, top_p, logits.shape[1])
    nothing = jnp.full(logits.shape[:1], -jnp.inf, jnp.float32)
    return jax.lax.cond(jnp.any(wanted.any), find, lambda: nothing)


def _cut(logits: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def _top_k_threshold(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    def enough(threshold: jax.Array) -> jax.Array:
        return jnp.sum(logits >= threshold, axis=-1, keepdims=True) >= top_k[:, None]

    return _highest(enough, logits.shape[0])


def _top_p_threshold(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(logits, axis=-1)
    # Rounding could leave the whole sum below a top_p close to 1.
    goal = jnp.minimum(top_p[:, None], probabilities.sum(-1, keepdims=True))

    def enough(threshold: jax.Array) -> jax.Array:
        mass = jnp.sum(jnp.where(logits >= threshold, probabilities, 0), axis=-1, keepdims=True)
        return (mass >= goal) & (mass > 0)  # a tiny top_p is zero in float32

    return _highest(enough, logits.shape[0])


def _highest(enough: Callable[[jax.Array], jax.Array], lanes: int) -> jax.Array:
    """The highest float [lanes] for which ``enough`` of [lanes, 1] holds, else -inf; it must be
    monotonic."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        # The rounded-up mean of low and high without overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        holds = enough(from_ordered(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    low, high = (
        jnp.full((lanes, 1), to_ordered(jnp.float32(limit)), jnp.int32)
        for limit in (-jnp.inf, jnp.inf)
    )
    return from_ordered(jax.lax.fori_loop(0, 32, halve, (low, high))[0])[:, 0]
