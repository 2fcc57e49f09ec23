"""Paged attention in jnp, in float32 or wider. Runs anywhere; the engine's path on a CPU.

Keys are read in chunks of pages up to the longest context that is really there, with a running
maximum and sum (online softmax, Milakov and Gimelshein 2018), so that the cost follows the data and
not the width of the page table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.variant import Variant

MASKED = -1e30
"""Score of a key that a query can't see; finite, so that a row without keys gives no NaN."""
CHUNK_TOKENS = 64
"""Keys read at once."""


Read = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""From page numbers [...] to keys and values, [..., kv_heads, page_size, their size] each."""


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    variant: Variant | None = None,
) -> jax.Array:
    """See ``api.paged_attention``."""

    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return k_pages[ids], v_pages[ids]

    rules = _Rules(scale, sliding_window, variant or Variant())
    return _attend_pages(q, read, k_pages.shape, q.shape[2], page_table, batch, rules)


def attend_pages(
    q: jax.Array,
    read: Read,
    pages: tuple[int, ...],
    value_size: int,
    page_table: jax.Array,
    batch: AttentionBatch,
    scale: float,
) -> jax.Array:
    """Plain attention over a cache of any form: ``read`` gives what its pages hold.

    Args:
        q, page_table, batch, scale: see ``api.paged_attention``.
        read: from page numbers to keys and values.
        pages: the shape of all keys, [pages, kv_heads, page_size, size].
        value_size: dimensions of a value.

    Returns:
        [T, heads, value_size].
    """
    rules = _Rules(scale, None, Variant())
    return _attend_pages(q, read, pages, value_size, page_table, batch, rules)


class _Rules(NamedTuple):
    """How scores are made and masked."""

    scale: float
    window: int | None
    variant: Variant


def _attend_pages(
    q: jax.Array,
    read: Read,
    pages: tuple[int, ...],
    value_size: int,
    page_table: jax.Array,
    batch: AttentionBatch,
    rules: _Rules,
) -> jax.Array:
    kv_heads, page_size = pages[1:3]
    chunk_pages = max(1, CHUNK_TOKENS // page_size)
    spare = -page_table.shape[1] % chunk_pages
    table = jnp.pad(page_table, ((0, 0), (0, spare)))  # the last chunk may reach over the edge

    def attend(out: jax.Array, lane: jax.Array, start: jax.Array, size: int) -> jax.Array:
        """Enters the outputs of queries ``start : start + size`` of each lane [N] into ``out``."""
        offset = start[:, None] + jnp.arange(size)
        valid = offset < batch.query_len[lane][:, None]
        # The place behind the end, which a scatter drops, for queries behind the lane's last.
        index = jnp.where(valid, batch.query_start[lane][:, None] + offset, q.shape[0])
        position = (batch.kv_len - batch.query_len)[lane][:, None] + offset
        position = jnp.where(valid, position, -1)
        own = table[batch.row[lane]]
        grouped = q[index].reshape(*index.shape, kv_heads, -1, q.shape[2])
        done = _attend(grouped, read, own, position, chunk_pages, page_size, value_size, rules)
        return out.at[index].set(done.astype(q.dtype), mode="drop")

    out = jnp.zeros((*q.shape[:2], value_size), q.dtype)
    lanes = jnp.arange(batch.row.shape[0])
    # Lanes with more than one query start behind their end here: they are cut into tiles below.
    one = jnp.where(batch.query_len == 1, 0, batch.query_len)
    out = attend(out, lanes, one, 1)
    if batch.tile_lane.shape[0] == 0:
        return out

    def tile(i: jax.Array, out: jax.Array) -> jax.Array:
        lane, start = (jax.lax.dynamic_slice(a, (i,), (1,)) for a in tiles)
        return attend(out, lane, start, batch.tile_tokens)

    tiles = batch.tile_lane, batch.tile_start
    used = jnp.sum(batch.tile_start < batch.query_len[batch.tile_lane])
    return jax.lax.fori_loop(0, used, tile, out)


def _attend(
    q: jax.Array,
    read: Read,
    pages: jax.Array,
    position: jax.Array,
    chunk_pages: int,
    page_size: int,
    value_size: int,
    rules: _Rules,
) -> jax.Array:
    """q [N, B, kv_heads, group, D] at ``position`` [N, B] (-1: none) over ``pages`` [N, n]."""
    n, tokens, kv_heads, group, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.astype(wide) * rules.scale
    chunk_tokens = chunk_pages * page_size
    variant, per_head = rules.variant, (kv_heads, group, 1)
    # Each lane's first query; far behind where there is none.
    furthest = jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max // 2).min(1)

    def step(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values, top, total = carry
        ids = jax.lax.dynamic_slice_in_dim(pages, chunk * chunk_pages, chunk_pages, 1)
        k, v = (part.astype(wide) for part in read(ids))
        key = chunk * chunk_tokens + jnp.arange(chunk_tokens).reshape(chunk_pages, page_size)
        distance = position[:, :, None, None] - key
        seen = distance >= 0
        if rules.window is not None:
            seen &= distance < rules.window
        scores = jnp.einsum("nbkgd,npksd->nkgbps", q, k, precision=jax.lax.Precision.HIGHEST)
        if variant.softcap is not None:
            scores = variant.softcap * jnp.tanh(scores / variant.softcap)
        if variant.alibi_slopes is not None:
            slopes = variant.alibi_slopes.reshape(*per_head, 1, 1)
            scores = scores - slopes * distance[:, None, None]
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max((-2, -1)))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None, None])
        # A slot behind the lane's end, or in a page before its window, may hold another request's
        # NaN, and 0 times NaN is NaN.
        own = key <= position.max(1)[:, None, None]
        if rules.window is not None:
            own &= key > (furthest - rules.window)[:, None, None]
        v = jnp.where(own[:, :, None, :, None], v, 0)
        added = jnp.einsum("nkgbps,npksd->nkgbd", weights, v, precision=jax.lax.Precision.HIGHEST)
        values = values * shrink[..., None] + added
        return values, new_top, total * shrink + weights.sum((-2, -1))

    shape = (n, kv_heads, group, tokens)
    if variant.sinks is None:
        top, total = jnp.full(shape, MASKED, wide), jnp.zeros(shape, wide)
    else:  # as if a key with that score and no value had been seen
        top = jnp.broadcast_to(variant.sinks.astype(wide).reshape(per_head), shape)
        total = jnp.ones(shape, wide)
    last = position.max() + 1
    first = jnp.zeros_like(last)
    if rules.window is not None:
        first = jnp.maximum(furthest.min() - rules.window + 1, 0) // chunk_tokens
    chunks = (last + chunk_tokens - 1) // chunk_tokens
    carry = jnp.zeros((*shape, value_size), wide), top, total
    values, _, total = jax.lax.fori_loop(first, chunks, step, carry)
    # A query whose every chunk was masked, or that isn't one, has no sum: it gives zero.
    out = values / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(n, tokens, kv_heads * group, value_size)
