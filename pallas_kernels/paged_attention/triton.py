"""Paged attention for NVIDIA GPUs, in Pallas with the Triton backend.

Three kernels write into one output that takes over q's buffer, since every program reads just the
queries whose outputs it writes: tiles of queries (prefill chunks), decode items (split-KV, one
query and a range of keys each, the whole GQA group in one matrix product), and the merge of the
items of a lane that has several (the log-sum-exp rescaling of FlashDecoding, Dao et al. 2023).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.paged_attention.batch import AttentionBatch

MASKED = -1e30
LOG2_E = math.log2(math.e)
MIN_ROWS = 16  # no side of a matrix product on the tensor cores may be smaller


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.paged_attention``; ``interpret`` runs the kernels on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernels need a GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Triton kernels have no {q.dtype} version")
    static = {
        "scale": scale * LOG2_E,  # exponentials are taken to base 2
        "window": sliding_window,
        "group": q.shape[1] // k_pages.shape[1],
    }
    cache = (k_pages, v_pages, page_table)
    if batch.tile_lane.shape[0]:
        q = _tiles(q, cache, batch, static, interpret)
    return _decode(q, cache, batch, static, interpret)


def _width(head_size: int) -> int:
    """Columns that a head takes in the kernels: what the tensor cores can multiply."""
    return max(MIN_ROWS, power_of_two(head_size))


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


def _gather_keys(pages: Any, page: jax.Array, head: jax.Array, slot: jax.Array, ok: jax.Array):
    """Loads [tile, head_size] rows of (page, head, slot), padded to a power of two with zeros."""
    size = pages.shape[3]
    tile, width = page.shape[0], _width(size)
    spread = lambda index: jnp.broadcast_to(index[:, None], (tile, width))  # noqa: E731
    column = jnp.broadcast_to(jnp.arange(width)[None, :], (tile, width))
    mask = spread(ok) & (column < size)
    heads = jnp.full((tile, width), head)
    return plt.load(pages.at[spread(page), heads, spread(slot), column], mask=mask, other=0)


def _online_softmax(carry, q, k, v, seen, scale):
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


def _empty_carry(rows: int, width: int):
    return (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )


# --- decode: one query per lane ---------------------------------------------------------------


def _decode(q, cache, batch: AttentionBatch, static, interpret: bool) -> jax.Array:
    k_pages, _, _ = cache
    size = q.shape[2]
    kv_heads = k_pages.shape[1]
    group, width = static["group"], _width(size)
    items, lanes = batch.decode_lane.shape[0], batch.row.shape[0]
    partial = [
        jax.ShapeDtypeStruct((items, kv_heads, group, size), jnp.float32),
        jax.ShapeDtypeStruct((items, kv_heads, group), jnp.float32),
        jax.ShapeDtypeStruct((items, kv_heads, group), jnp.float32),
    ]
    rows = max(MIN_ROWS, power_of_two(group))
    tile = 64 if width <= 128 else 32
    if q.dtype == jnp.float32:
        tile //= 2
    out, *parts = _call(
        functools.partial(_decode_kernel, tile=tile, rows=rows, width=width, **static),
        "paged_decode",
        (items, kv_heads),
        [jax.ShapeDtypeStruct(q.shape, q.dtype), *partial],
        interpret,
        warps=2,
        stages=3,
        input_output_aliases={10: 0},
    )(
        batch.decode_lane,
        batch.decode_start,
        batch.decode_end,
        batch.decode_count,
        batch.query_start,
        batch.kv_len,
        batch.row,
        *(cache[2], cache[0], cache[1]),
        q,
    )
    return _call(
        functools.partial(_merge_kernel, rows=power_of_two(group), width=width, group=group),
        "paged_decode_merge",
        (lanes, kv_heads),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret,
        warps=1,
        stages=1,
        input_output_aliases={6: 0},
    )(batch.decode_first, batch.decode_count, batch.query_start, *parts, out)


def _group_index(token, head, rows: int, width: int, group: int, size: int):
    """Indices [rows, width] of a GQA group's vectors in q, and which of them exist."""
    member = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, width))
    column = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    tokens = jnp.full((rows, width), token)
    return (tokens, head * group + member, column), (member < group) & (column < size)


def _decode_kernel(
    lane_ref, start_ref, end_ref, count_ref, query_start_ref, kv_len_ref, row_ref, table_ref,
    k_ref, v_ref, q_ref, out_ref, values_ref, top_ref, total_ref,
    *, tile, rows, width, scale, window, group,
):  # fmt: skip
    item, head = pl.program_id(0), pl.program_id(1)
    lane, start, end = lane_ref[item], start_ref[item], end_ref[item]
    token, row, count = query_start_ref[lane], row_ref[lane], count_ref[lane]
    index, exists = _group_index(token, head, rows, width, group, q_ref.shape[2])
    q = plt.load(q_ref.at[index], mask=exists, other=0)
    page_size = k_ref.shape[2]
    first = start if window is None else jnp.maximum(start, kv_len_ref[lane] - window)
    total_tiles = jnp.where(end > first, lax.div(end - first + tile - 1, tile), 0)

    def step(i, carry):
        position = first + i * tile + jnp.arange(tile)
        seen = position < end
        rows_of_table = jnp.full((tile,), row)
        column = lax.div(position, page_size)
        page = plt.load(table_ref.at[rows_of_table, column], mask=seen, other=0)
        slot = lax.rem(position, page_size)
        k = _gather_keys(k_ref, page, head, slot, seen)
        v = _gather_keys(v_ref, page, head, slot, seen)
        return _online_softmax(carry, q, k, v, seen[None, :], scale)

    values, top, total = lax.fori_loop(0, total_tiles, step, _empty_carry(rows, width))
    alone = exists & (count == 1) & (end > start)
    plt.store(out_ref.at[index], (values / total[:, None]).astype(out_ref.dtype), mask=alone)
    member, column = index[1] - head * group, index[2]
    items = jnp.full((rows, width), item)
    heads = jnp.full((rows, width), head)
    several = exists & (count > 1)
    plt.store(values_ref.at[items, heads, member, column], values, mask=several)
    one = jnp.arange(rows)
    mask = (one < group) & (count > 1)
    where = (jnp.full((rows,), item), jnp.full((rows,), head), one)
    plt.store(top_ref.at[where], top, mask=mask)
    plt.store(total_ref.at[where], total, mask=mask)


def _merge_kernel(
    first_ref, count_ref, query_start_ref, values_ref, top_ref, total_ref, q_ref, out_ref,
    *, rows, width, group,
):  # fmt: skip
    lane, head = pl.program_id(0), pl.program_id(1)
    first, count, token = first_ref[lane], count_ref[lane], query_start_ref[lane]
    index, exists = _group_index(token, head, rows, width, group, out_ref.shape[2])
    member, column = index[1] - head * group, index[2]
    heads, one = jnp.full((rows, width), head), jnp.arange(rows)

    def step(i, carry):
        values, top, total = carry
        items = jnp.full((rows, width), first + i)
        part = plt.load(values_ref.at[items, heads, member, column], mask=exists, other=0)
        where = (jnp.full((rows,), first + i), jnp.full((rows,), head), one)
        part_top = plt.load(top_ref.at[where], mask=one < group, other=MASKED)
        part_total = plt.load(total_ref.at[where], mask=one < group, other=0)
        new_top = jnp.maximum(top, part_top)
        old, new = jnp.exp2(top - new_top), jnp.exp2(part_top - new_top)
        values = values * old[:, None] + part * new[:, None]
        return values, new_top, total * old + part_total * new

    steps = jnp.where(count > 1, count, 0)
    values, _, total = lax.fori_loop(0, steps, step, _empty_carry(rows, width))
    mask = exists & (count > 1)
    plt.store(out_ref.at[index], (values / total[:, None]).astype(out_ref.dtype), mask=mask)


# --- tiles of queries: prefill and chunks -------------------------------------------------------


def _tiles(q, cache, batch: AttentionBatch, static, interpret: bool) -> jax.Array:
    kv_heads, size = cache[0].shape[1], q.shape[2]
    members = power_of_two(static["group"])
    wide = q.dtype == jnp.float32 or size > 128
    kernel = functools.partial(
        _tile_kernel,
        tile=32 if wide else 64,
        tokens=max(batch.tile_tokens, MIN_ROWS // members),
        members=members,
        width=_width(size),
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
    )


def _tile_kernel(
    lane_ref, tile_start_ref, query_start_ref, query_len_ref, kv_len_ref, row_ref, table_ref,
    k_ref, v_ref, q_ref, out_ref,
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
    index = (token, spread(jnp.where(used, head * group + member, 0)), column)
    exists = spread(used) & (column < size)
    q = plt.load(q_ref.at[index], mask=exists, other=0)

    position = kv_len - length + query
    first_position = kv_len - length + offset
    end = jnp.minimum(kv_len, first_position + step_tokens)
    start = 0
    if window is not None:
        start = lax.div(jnp.maximum(first_position - window + 1, 0), tile) * tile

    def step(i, carry, masked):
        key = start + i * tile + jnp.arange(tile)
        ok = key < end
        column = lax.div(key, page_size)
        page = plt.load(table_ref.at[jnp.full((tile,), row), column], mask=ok, other=0)
        slot = lax.rem(key, page_size)
        k = _gather_keys(k_ref, page, head, slot, ok)
        v = _gather_keys(v_ref, page, head, slot, ok)
        distance = position[:, None] - key[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if not masked:
            seen = jnp.full((rows, tile), True)
        return _online_softmax(carry, q, k, v, seen, scale)

    busy = offset < length
    # Tiles wholly before the first query need no mask, unless a window cuts them.
    whole = jnp.where(busy, lax.div(first_position + 1, tile), 0) if window is None else 0
    every = jnp.where(busy, lax.div(end - start + tile - 1, tile), 0)
    carry = _empty_carry(rows, width)
    carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
    values, _, total = lax.fori_loop(whole, every, functools.partial(step, masked=True), carry)
    plt.store(out_ref.at[index], (values / total[:, None]).astype(out_ref.dtype), mask=exists)
