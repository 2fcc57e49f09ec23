"""The op as its two halves' references. Runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.reference import paged_attention
from pallas_kernels.paged_attention.variant import Variant
from pallas_kernels.rope_kv_write.reference import rope_kv_write
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm, Result


def decode_attention(
    qkv: jax.Array,
    cos_sin: CosSin | None,
    norm: HeadNorm | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    dtype: jnp.dtype,
    scale: float,
    sliding_window: int | None = None,
    variant: Variant | None = None,
) -> Result:
    """See ``api.decode_attention``."""
    q, k_pages, v_pages = rope_kv_write(
        qkv, cos_sin, norm, k_pages, v_pages, page, slot, dtype=dtype
    )
    out = paged_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        variant=variant,
    )
    return out, k_pages, v_pages
