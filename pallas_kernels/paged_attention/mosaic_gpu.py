"""Paged attention for Hopper GPUs, in Pallas with the Mosaic GPU backend.

Tiles of queries (prefill chunks) and decode items are kernels of their own. ``paged_attention``
leaves decode items to the Triton kernel: they are bound by memory, which it saturates.
``paged_attention_mosaic_only`` does both; the speed of its decoding has not been measured.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import hopper_cores
from pallas_kernels.paged_attention import mosaic_gpu_decode, mosaic_gpu_prefill
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.mosaic_gpu_shape import (
    CONSUMER_ROWS,
    ROWS,
    DecodeShape,
    Shape,
)
from pallas_kernels.paged_attention.variant import Variant, refuse

LOG2_E = math.log2(math.e)
INTERPRETED_CORES = 1


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
    refuse(variant)
    try:
        from pallas_kernels.paged_attention.triton_decode import decode as triton_decode
    except ImportError as missing:
        raise NotImplementedError("decoding needs Pallas' Triton backend") from missing
    q = prefill(q, k_pages, v_pages, page_table, batch, scale=scale, sliding_window=sliding_window)
    cache = (k_pages, v_pages, page_table)
    return triton_decode(q, *cache, batch, scale=scale * LOG2_E, window=sliding_window)


def paged_attention_mosaic_only(
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
    refuse(variant)
    cache = (k_pages, v_pages, page_table)
    if batch.tile_lane.shape[0]:
        q = prefill(q, *cache, batch, scale=scale, sliding_window=sliding_window)
    return decode(q, *cache, batch, scale=scale, sliding_window=sliding_window)


def prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """q with the queries of the batch's tiles replaced by their attention.

    Args:
        q, k_pages, v_pages, page_table, batch, scale, sliding_window: see ``api.paged_attention``.
        interpret: ``InterpretGPUParams`` to run on a CPU, slowly.

    Raises:
        NotImplementedError: the kernel can't run this case here.
    """
    common = _common(q, k_pages, page_table, scale, sliding_window, interpret)
    shape = Shape(**common, tile_tokens=batch.tile_tokens)
    tokens = shape.tile_tokens
    if not batch.tile_lane.shape[0]:
        raise NotImplementedError("the Mosaic GPU kernel is for batches with tiles of queries")
    _check(shape, q, k_pages)
    if tokens % 8 or tokens & (tokens - 1) or shape.group * tokens > ROWS or tokens > q.shape[0]:
        raise NotImplementedError(
            f"tiles of {tokens} tokens x {shape.group} heads don't fit the Mosaic GPU kernel"
        )
    return mosaic_gpu_prefill.prefill(shape, q, k_pages, v_pages, page_table, batch)


def decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """q with the queries of the batch's decode items replaced by their attention.

    Args:
        q, k_pages, v_pages, page_table, batch, scale, sliding_window: see ``api.paged_attention``.
        interpret: ``InterpretGPUParams`` to run on a CPU, slowly.

    Raises:
        NotImplementedError: the kernel can't run this case here.
    """
    shape = DecodeShape(**_common(q, k_pages, page_table, scale, sliding_window, interpret))
    _check(shape, q, k_pages)
    if shape.members > CONSUMER_ROWS:
        raise NotImplementedError(f"the Mosaic GPU kernel has no groups of {shape.group} heads")
    return mosaic_gpu_decode.decode(shape, q, k_pages, v_pages, page_table, batch)


def _common(
    q: jax.Array,
    k_pages: jax.Array,
    page_table: jax.Array,
    scale: float,
    window: int | None,
    interpret: Any,
) -> dict[str, Any]:
    """The fields of a CommonShape."""
    return {
        "dtype": q.dtype,
        "heads": q.shape[1],
        "kv_heads": k_pages.shape[1],
        "head_size": q.shape[2],
        "page_size": k_pages.shape[2],
        "table_width": page_table.shape[1],
        "scale": scale * LOG2_E,  # exponentials are taken to base 2
        "window": window,
        "cores": INTERPRETED_CORES if interpret else hopper_cores(),
        "interpret": interpret,
    }


def _check(shape: Shape | DecodeShape, q: jax.Array, k_pages: jax.Array) -> None:
    """Raises NotImplementedError, with the reason, for what neither kernel can do."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype:
        raise NotImplementedError(
            f"the Mosaic GPU kernel has no version for q in {q.dtype}, keys in {k_pages.dtype}"
        )
    if shape.head_size % 16 or shape.head_size > 256:
        raise NotImplementedError(f"the copy engine can't lay out heads of {shape.head_size}")
    if shape.page_size % 8 or shape.keys % shape.page_size:
        raise NotImplementedError(f"the Mosaic GPU kernel has no pages of {shape.page_size}")
