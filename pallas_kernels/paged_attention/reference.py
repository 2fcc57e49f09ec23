"""Paged attention in jnp, in float32 or wider. Runs anywhere; the engine's path on a CPU.

Keys are read in chunks of pages up to the longest context that is really there, with a running
maximum and sum (online softmax, Milakov and Gimelshein 2018), so that the cost follows the data and
not the width of the page table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.batch import AttentionBatch

MASKED = -1e30
"""Score of a key that a query can't see; finite, so that a row without keys gives no NaN."""
CHUNK_TOKENS = 64
"""Keys read at once."""


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> jax.Array:
    """See ``api.paged_attention``."""
    chunk_pages = max(1, CHUNK_TOKENS // k_pages.shape[2])
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
        pages = table[batch.row[lane]]
        done = _attend(
            q[index], k_pages, v_pages, pages, position, chunk_pages, scale, sliding_window
        )
        return out.at[index].set(done.astype(q.dtype), mode="drop")

    lanes = jnp.arange(batch.row.shape[0])
    # Lanes with more than one query start behind their end here: they are cut into tiles below.
    one = jnp.where(batch.query_len == 1, 0, batch.query_len)
    out = attend(q, lanes, one, 1)
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
    k_pages: jax.Array,
    v_pages: jax.Array,
    pages: jax.Array,
    position: jax.Array,
    chunk_pages: int,
    scale: float,
    sliding_window: int | None,
) -> jax.Array:
    """q [N, B, heads, D] at ``position`` [N, B] (-1: none) over the lanes' ``pages`` [N, n]."""
    n, tokens, heads, size = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    group = heads // kv_heads
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(n, tokens, kv_heads, group, size).astype(wide) * scale
    chunk_tokens = chunk_pages * page_size

    def step(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values, top, total = carry
        ids = jax.lax.dynamic_slice_in_dim(pages, chunk * chunk_pages, chunk_pages, 1)
        k, v = (pool[ids].astype(wide) for pool in (k_pages, v_pages))
        key = chunk * chunk_tokens + jnp.arange(chunk_tokens).reshape(chunk_pages, page_size)
        distance = position[:, :, None, None] - key
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        scores = jnp.einsum("nbkgd,npksd->nkgbps", q, k, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max((-2, -1)))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None, None])
        # A slot behind the lane's end may hold another request's NaN, and 0 times NaN is NaN.
        own = key <= position.max(1)[:, None, None]
        v = jnp.where(own[:, :, None, :, None], v, 0)
        added = jnp.einsum("nkgbps,npksd->nkgbd", weights, v, precision=jax.lax.Precision.HIGHEST)
        values = values * shrink[..., None] + added
        return values, new_top, total * shrink + weights.sum((-2, -1))

    empty = (
        jnp.zeros((n, kv_heads, group, tokens, size), wide),
        jnp.full((n, kv_heads, group, tokens), MASKED, wide),
        jnp.zeros((n, kv_heads, group, tokens), wide),
    )
    last = position.max() + 1
    first = jnp.zeros_like(last)
    if sliding_window is not None:
        furthest = jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max // 2).min()
        first = jnp.maximum(furthest - sliding_window + 1, 0) // chunk_tokens
    chunks = (last + chunk_tokens - 1) // chunk_tokens
    values, _, total = jax.lax.fori_loop(first, chunks, step, empty)
    # A query whose every chunk was masked, or that isn't one, has no sum: it gives zero.
    out = values / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(n, tokens, heads, size)
