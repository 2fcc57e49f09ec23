"""Paged attention for NVIDIA GPUs, in Pallas with the Triton backend.

Two kernels write into one output that takes over q's buffer, since every program reads just the
queries whose outputs it writes: tiles of queries (prefill chunks), and decode items
(``triton_decode.py``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.triton_common import (
    LOG2_E,
    MIN_ROWS,
    RowVariant,
    first_carry,
    gather_keys,
    online_softmax,
    padded_width,
)
from pallas_kernels.paged_attention.triton_decode import (
    Config,
    candidates,
    decode,
    tuning_key,
)
from pallas_kernels.paged_attention.variant import Variant

__all__ = ["Config", "candidates", "paged_attention", "tuning_key"]


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
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.paged_attention``; ``config`` is the decode kernel's, and ``interpret`` runs the
    kernels on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernels need a GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Triton kernels have no {q.dtype} version")
    scale *= LOG2_E
    variant = variant or Variant()
    static = {
        "scale": scale,
        "window": sliding_window,
        "group": q.shape[1] // k_pages.shape[1],
    }
    cache = (k_pages, v_pages, page_table)
    if batch.tile_lane.shape[0]:
        q = _tiles(q, cache, batch, variant, static, interpret)
    return decode(
        q,
        *cache,
        batch,
        scale=scale,
        window=sliding_window,
        variant=variant,
        config=config,
        interpret=interpret,
    )


def _call(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    interpret: bool,
    warps: int,
    stages: int,
    **kw: Any,
) -> Any:
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        **kw,
    )


# --- tiles of queries: prefill and chunks -------------------------------------------------------


def _tiles(q, cache, batch: AttentionBatch, variant: Variant, static, interpret: bool) -> jax.Array:
    kv_heads, size = cache[0].shape[1], q.shape[2]
    members = power_of_two(static["group"])
    wide = q.dtype == jnp.float32 or size > 128
    kernel = functools.partial(
        _tile_kernel,
        tile=32 if wide else 64,
        tokens=max(batch.tile_tokens, MIN_ROWS // members),
        members=members,
        width=padded_width(size),
        step_tokens=batch.tile_tokens,
        **static,
    )
    return _call(
        kernel,
        "paged_prefill",
        (batch.tile_lane.shape[0], kv_heads),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret,
        warps=8 if wide or size == 128 else 4,
        stages=2,
        input_output_aliases={9: 0},
    )(
        batch.tile_lane,
        batch.tile_start,
        batch.query_start,
        batch.query_len,
        batch.kv_len,
        batch.row,
        *(cache[2], cache[0], cache[1]),
        q,
        variant,
    )


def _tile_kernel(
    lane_ref, tile_start_ref, query_start_ref, query_len_ref, kv_len_ref, row_ref, table_ref,
    k_ref, v_ref, q_ref, variant_refs, out_ref,
    *, tile, tokens, step_tokens, members, width, scale, window, group,
):  # fmt: skip
    item, head = pl.program_id(0), pl.program_id(1)
    lane = lane_ref[item]
    offset, length = tile_start_ref[item], query_len_ref[lane]
    row, kv_len = row_ref[lane], kv_len_ref[lane]
    size, page_size = q_ref.shape[2], k_ref.shape[2]
    rows = tokens * members

    # Each token's GQA group fills ``members`` rows. (Floor division costs sign handling; not div.)
    query = offset + lax.div(jnp.arange(rows), members)
    member = lax.rem(jnp.arange(rows), members)
    used = (query < length) & (query < offset + step_tokens) & (member < group)
    spread = lambda value: jnp.broadcast_to(value[:, None], (rows, width))  # noqa: E731
    column = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    token = spread(jnp.where(used, query_start_ref[lane] + query, 0))
    heads = jnp.where(used, head * group + member, 0)
    index = (token, spread(heads), column)
    exists = spread(used) & (column < size)
    q = plt.load(q_ref.at[index], mask=exists, other=0)
    variant = RowVariant.load(variant_refs, heads, used)

    position = kv_len - length + query
    first_position = kv_len - length + offset
    end = jnp.minimum(kv_len, first_position + step_tokens)
    start = 0
    if window is not None:
        # Not a slot of an earlier page: whoever owns that now may have left NaN there.
        start = lax.div(jnp.maximum(first_position - window + 1, 0), page_size) * page_size

    def step(i, carry, masked):
        key = start + i * tile + jnp.arange(tile)
        ok = key < end
        column = lax.div(key, page_size)
        page = plt.load(table_ref.at[jnp.full((tile,), row), column], mask=ok, other=0)
        slot = lax.rem(key, page_size)
        k = gather_keys(k_ref, page, head, slot, ok)
        v = gather_keys(v_ref, page, head, slot, ok)
        distance = position[:, None] - key[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if not masked:
            seen = jnp.full((rows, tile), True)
        return online_softmax(carry, q, k, v, seen, scale, variant, distance)

    busy = offset < length
    # Tiles wholly before the first query need no mask, unless a window cuts them.
    whole = jnp.where(busy, lax.div(first_position + 1, tile), 0) if window is None else 0
    every = jnp.where(busy, lax.div(end - start + tile - 1, tile), 0)
    carry = first_carry(rows, width, variant)
    carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
    values, _, total = lax.fori_loop(whole, every, functools.partial(step, masked=True), carry)
    plt.store(out_ref.at[index], (values / total[:, None]).astype(out_ref.dtype), mask=exists)
