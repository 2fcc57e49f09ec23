"""Kernels that stand for a user's own: right ones, and ones with a bug that a gate must find."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.latent_attention import reference as latent
from pallas_kernels.paged_attention import reference

traces: list[tuple[str, int]] = []
"""(kernel, token places) of each trace of a kernel that says so."""


def attention(q: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
    """Right, and says that it was traced."""
    traces.append(("attention", q.shape[0]))
    return reference.paged_attention(q, *arguments, **options)


def attention_in_dense(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, batch: Any,
    *, scale: float, sliding_window: int | None = None, **hints: Any,
) -> jax.Array:  # fmt: skip
    """Right: every query against every key of its row, NaN and all masked away."""
    tokens = jnp.arange(q.shape[0])[:, None]
    owns = (tokens >= batch.query_start) & (tokens < batch.query_start + batch.query_len)
    lane = owns.argmax(1)
    position = batch.kv_len[lane] - batch.query_len[lane] + tokens[:, 0] - batch.query_start[lane]
    group = q.shape[1] // k_pages.shape[1]

    def keys(pages: jax.Array) -> jax.Array:  # [T, keys, heads, head_size]
        mine = pages[page_table[batch.row[lane]]].swapaxes(2, 3)
        return mine.reshape(q.shape[0], -1, *mine.shape[3:]).repeat(group, 2)

    k, v = keys(k_pages), keys(v_pages)
    distance = position[:, None] - jnp.arange(k.shape[1])
    seen = (distance >= 0) & (distance < (sliding_window or 1 << 30)) & owns.any(1)[:, None]
    scores = jnp.einsum("thd,tkhd->thk", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), -1)
    v = jnp.where(seen[:, :, None, None], v, 0)
    return jnp.einsum("thk,tkhd->thd", weights, v, preferred_element_type=jnp.float32).astype(
        q.dtype
    )


def attention_for_decoding(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, batch: Any,
    **options: Any,
) -> jax.Array:  # fmt: skip
    """Right, but for steps that only decode."""
    if batch.tile_lane.shape[0]:
        raise NotImplementedError("this kernel only decodes")
    traces.append(("attention_for_decoding", q.shape[0]))
    return reference.paged_attention(q, k_pages, v_pages, page_table, batch, **options)


def attention_with_wrong_scale(*arguments: Any, scale: float, **options: Any) -> jax.Array:
    """Scores a tenth too large."""
    return reference.paged_attention(*arguments, scale=1.1 * scale, **options)


def latent_attention_with_wrong_scale(*arguments: Any, scale: float, **options: Any) -> jax.Array:
    """Scores a tenth too large."""
    return latent.latent_attention(*arguments, scale=1.1 * scale, **options)


def attention_that_reads_padding(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *arguments: Any, **options: Any
) -> jax.Array:
    """Adds nothing of a page that is nobody's; 0 times NaN is NaN."""
    out = reference.paged_attention(q, k_pages, v_pages, *arguments, **options)
    return out + 0 * v_pages[0, 0, 0]


def attention_for_nothing(*arguments: Any, **options: Any) -> jax.Array:
    """Can do nothing."""
    raise NotImplementedError("not written yet")
