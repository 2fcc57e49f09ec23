"""What the Triton kernels for decoding and for prefill share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two

MASKED = -1e30
"""Score of a key that a query can't see; finite, so that a row without keys gives no NaN."""
MIN_ROWS = 16
"""No side of a matrix product on the tensor cores may be smaller."""

Carry = tuple[jax.Array, jax.Array, jax.Array]


def padded_width(head_size: int) -> int:
    """Columns that a head takes in the kernels: what the tensor cores can multiply."""
    return max(MIN_ROWS, power_of_two(head_size))


def gather_keys(
    pages: Any, page: jax.Array, head: jax.Array, slot: jax.Array, ok: jax.Array
) -> jax.Array:
    """Loads [tile, head_size] rows of (page, head, slot), padded to a power of two with zeros."""
    size = pages.shape[3]
    tile, width = page.shape[0], padded_width(size)

    def spread(index: jax.Array) -> jax.Array:
        return jnp.broadcast_to(index[:, None], (tile, width))

    column = jnp.broadcast_to(jnp.arange(width)[None, :], (tile, width))
    mask = spread(ok) & (column < size)
    heads = jnp.full((tile, width), head)
    return plt.load(pages.at[spread(page), heads, spread(slot), column], mask=mask, other=0)


def online_softmax(
    carry: Carry, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float
) -> Carry:
    """One step over a tile of keys: carry is (weighted values, running max, running sum)."""
    values, top, total = carry
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = plt.dot(q, k.T, precision=precision) * scale
    scores = jnp.where(seen, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - new_top[:, None])
    values = values * shrink[:, None] + plt.dot(weights.astype(v.dtype), v, precision=precision)
    return values, new_top, total * shrink + weights.sum(1)


def empty_carry(rows: int, width: int) -> Carry:
    """The carry before the first tile."""
    return (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
