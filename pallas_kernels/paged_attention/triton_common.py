"""What the Triton kernels for decoding and for prefill share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.paged_attention.variant import Variant

LOG2_E = math.log2(math.e)
"""Times natural units, in which the op's arguments are, gives the kernels': they take exponentials
to base 2."""
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


class RowVariant(NamedTuple):
    """A variant as the rows of a tile of queries see it, in the kernels' units. What the model
    doesn't have is None, and leaves no trace in the kernel.

    Attributes:
        softcap: of the scores.
        slopes: float32 [rows], what each token between query and key takes from the score.
        sinks: float32 [rows].
    """

    softcap: float | None = None
    slopes: jax.Array | None = None
    sinks: jax.Array | None = None

    @classmethod
    def load(cls, variant: Variant, heads: jax.Array, used: jax.Array) -> RowVariant:
        """The parts of a variant, whose arrays are references here, for rows of query heads."""

        def of_rows(ref: Any) -> jax.Array | None:
            if ref is None:
                return None
            return plt.load(ref.at[heads], mask=used, other=0).astype(jnp.float32) * LOG2_E

        softcap = None if variant.softcap is None else variant.softcap * LOG2_E
        return cls(softcap, of_rows(variant.alibi_slopes), of_rows(variant.sinks))

    def apply(self, scores: jax.Array, distance: Any) -> jax.Array:
        """The changed scores [rows, keys].

        Args:
            scores: [rows, keys].
            distance: int32 [rows or 1, keys], the query's position less the key's; may be None
                without slopes.
        """
        if self.softcap is not None:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)): one exponential, where a library's tanh branches.
            # (The cap cancels in the exponent's units: x is a ratio.)
            grown = jnp.exp2(scores * (2 * LOG2_E / self.softcap))
            scores = self.softcap - 2 * self.softcap / (1 + grown)
        if self.slopes is not None:
            scores = scores - self.slopes[:, None] * distance.astype(jnp.float32)
        return scores


PLAIN = RowVariant()


def online_softmax(
    carry: Carry,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    variant: RowVariant = PLAIN,
    distance: Any = None,
) -> Carry:
    """One step over a tile of keys: carry is (weighted values, running max, running sum).
    ``distance`` is for ``variant.apply``."""
    values, top, total = carry
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = variant.apply(plt.dot(q, k.T, precision=precision) * scale, distance)
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


def first_carry(rows: int, width: int, variant: RowVariant, first: Any = True) -> Carry:
    """The carry of a row's first tile, which the row's sink has entered as a key without a value;
    where ``first`` is false, that of later ones."""
    values, top, total = empty_carry(rows, width)
    if variant.sinks is None:
        return values, top, total
    return values, jnp.where(first, variant.sinks, top), jnp.where(first, 1.0, total)
