"""Paged attention in jnp: gathers each lane's pages and computes in float32. Runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.batch import AttentionBatch

MASKED = -1e30
"""Score of a key that a query can't see; finite, so that a row without keys gives no NaN."""


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

    def attend(lane: jax.Array, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Outputs [N, size, ...] of queries ``start : start + size`` of each lane, and where they
        belong in q; T, which a scatter drops, for those behind the lane's last."""
        offset = start[:, None] + jnp.arange(size)
        valid = offset < batch.query_len[lane][:, None]
        index = jnp.where(valid, batch.query_start[lane][:, None] + offset, q.shape[0])
        position = (batch.kv_len - batch.query_len)[lane][:, None] + offset
        pages = page_table[batch.row[lane]]
        out = _attend(q[index], k_pages[pages], v_pages[pages], position, scale, sliding_window)
        return out.astype(q.dtype), index

    lanes = jnp.arange(batch.row.shape[0])
    if batch.tile_lane.shape[0] == 0:
        out, index = attend(lanes, jnp.zeros_like(lanes), 1)
        return q.at[index].set(out, mode="drop")
    one = jnp.where(batch.query_len == 1, 0, batch.query_len)  # others start behind their end
    out, index = attend(lanes, one, 1)
    result = q.at[index].set(out, mode="drop")
    out, index = attend(batch.tile_lane, batch.tile_start, batch.tile_tokens)
    return result.at[index].set(out, mode="drop")


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    scale: float,
    sliding_window: int | None,
) -> jax.Array:
    """q [N, B, heads, D] at ``position`` [N, B] against k, v [N, pages, kv_heads, page_size, D]."""
    n, tokens, heads, size = q.shape
    pages, kv_heads, page_size = k.shape[1:4]
    q = q.reshape(n, tokens, kv_heads, heads // kv_heads, size).astype(jnp.float32)
    scores = jnp.einsum("nbkgd,npksd->nkgbps", q, k.astype(jnp.float32)) * scale
    key = jnp.arange(pages * page_size).reshape(pages, page_size)
    distance = position[:, :, None, None] - key
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    flat = scores.reshape(*scores.shape[:4], -1)
    weights = jax.nn.softmax(flat, axis=-1).reshape(scores.shape)
    out = jnp.einsum("nkgbps,npksd->nbkgd", weights, v.astype(jnp.float32))
    return out.reshape(n, tokens, heads, size)
