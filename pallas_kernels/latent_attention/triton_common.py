"""What the Triton kernels for decoding and for prefill share.

A key is read once, in blocks of columns: those of the latent, which are the value's too, and behind
them those of the rotated part. Narrow blocks keep the operands of each product small; their scores
add up, and each block of the values has an accumulator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.paged_attention.triton_common import MASKED, padded_width

WIDTH = 128
"""Most columns of a block."""

Carry = tuple[tuple[jax.Array, ...], jax.Array, jax.Array]
"""Weighted values by block, the running maximum, the running sum."""
Seen = Callable[[jax.Array], jax.Array]
"""From the positions [tile] of keys to whether each row sees them, [rows or 1, tile]."""


class Block(NamedTuple):
    """Columns ``start : stop`` of queries and keys, in ``width`` columns of registers."""

    start: int
    stop: int
    width: int


def column_blocks(latent_size: int, size: int) -> tuple[list[Block], list[Block]]:
    """The blocks of the latent and of what stands behind it."""

    def cut(start: int, stop: int) -> list[Block]:
        starts = range(start, stop, WIDTH)
        return [Block(s, e := min(s + WIDTH, stop), padded_width(e - s)) for s in starts]

    return cut(0, latent_size), cut(latent_size, size)


def places(index: tuple[jax.Array, ...], ok: jax.Array, block: Block) -> tuple[Any, jax.Array]:
    """Where a block's columns of vectors stand in an array.

    Args:
        index: their other indices, [rows] each.
        ok: bool [rows], the vectors that are there.

    Returns:
        The index of [rows, width] entries, and which of them exist.
    """
    shape = (ok.shape[0], block.width)
    column = jnp.broadcast_to(block.start + jnp.arange(block.width)[None, :], shape)
    mask = jnp.broadcast_to(ok[:, None], shape) & (column < block.stop)
    return (*(jnp.broadcast_to(i[:, None], shape) for i in index), column), mask


def load(
    ref: Any, index: tuple[jax.Array, ...], ok: jax.Array, blocks: list[Block]
) -> list[jax.Array]:
    """The blocks [rows, width] of vectors, with zeros where nothing exists; see ``places``."""
    found = [places(index, ok, block) for block in blocks]
    return [plt.load(ref.at[place], mask=mask, other=0) for place, mask in found]


def store_result(
    out_ref: Any, index: tuple[jax.Array, ...], ok: jax.Array, blocks: list[Block], carry: Carry
) -> None:
    """Writes the values of a finished softmax."""
    for block, value in zip(blocks, carry[0], strict=True):
        place, mask = places(index, ok, block)
        plt.store(out_ref.at[place], (value / carry[2][:, None]).astype(out_ref.dtype), mask=mask)


def empty_carry(rows: int, values: list[Block]) -> Carry:
    """The carry before the first tile."""
    return (
        tuple(jnp.zeros((rows, block.width), jnp.float32) for block in values),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )


def rescaled(carry: Carry, new_top: jax.Array) -> Carry:
    """The same sums relative to a new maximum."""
    values, top, total = carry
    shrink = jnp.exp2(top - new_top)
    return tuple(value * shrink[:, None] for value in values), new_top, total * shrink


def attend(
    carry: Carry,
    q: list[jax.Array],
    tiles: tuple[jax.Array | int, jax.Array],
    seen: Seen | None,
    *,
    cache: tuple[Any, Any],
    row: jax.Array,
    keys: tuple[jax.Array | int, jax.Array],
    tile: int,
    blocks: list[Block],
    scale: float,
) -> Carry:
    """The online softmax over some tiles of a row's keys.

    Args:
        carry: of the tiles before.
        q: the queries' blocks.
        tiles: the first and the end of those to go through.
        seen: what queries see of a tile's keys; None if they see all.
        cache: refs of the page table and of the pages.
        row: of the page table.
        keys: the first position, from which tiles are counted, and the end of all.
        tile: keys in a tile.
        blocks: of the keys; the first of them, as many as the carry has, are the values'.
        scale: of the scores, times log2(e).
    """
    table_ref, pages_ref = cache
    start, end = keys
    page_size = pages_ref.shape[2]
    precision = lax.Precision.HIGHEST if q[0].dtype == jnp.float32 else None

    def step(i: jax.Array, carry: Carry) -> Carry:
        position = start + i * tile + jnp.arange(tile)
        ok = position < end
        page_index = lax.div(position, page_size)
        page = plt.load(table_ref.at[jnp.full((tile,), row), page_index], mask=ok, other=0)
        index = (page, jnp.zeros((tile,), jnp.int32), lax.rem(position, page_size))
        k = load(pages_ref, index, ok, blocks)
        scores = sum(plt.dot(a, b.T, precision=precision) for a, b in zip(q, k, strict=True))
        scores = scores * scale
        if seen is not None:
            scores = jnp.where(seen(position), scores, MASKED)
        new_top = jnp.maximum(carry[1], scores.max(1))
        values, _, total = rescaled(carry, new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        narrow = weights.astype(k[0].dtype)
        values = tuple(
            value + plt.dot(narrow, latent, precision=precision)
            for value, latent in zip(values, k, strict=False)
        )
        return values, new_top, total + weights.sum(1)

    return lax.fori_loop(*tiles, step, carry)
