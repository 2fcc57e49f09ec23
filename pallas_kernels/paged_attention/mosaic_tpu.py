"""Paged attention for TPUs, in Pallas with the Mosaic backend.

One kernel runs twice: over the plan's tiles of queries, and over the lanes with a single query. It
walks through all chunks of keys of all its items as one sequence, in three stages: while a chunk is
computed, the pages of the next one are on their way from HBM, and the page ids of the one after
that. So neither a short context nor a new item leaves the memory idle. A TPU core works through a
sequence, so contexts are not split: the plan's ``decode_*`` arrays are of no use here.

Keys and values stay in HBM and come page by page, all KV heads at once. The queries of a KV head's
group are the rows of its matrix products. The softmax is the online one (Milakov and Gimelshein
2018), in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lowering import can_lower_mosaic_tpu
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.variant import Variant, refuse

MASKED = -1e30
LOG2_E = math.log2(math.e)
CHUNK_KEYS = 256
"""Keys of a chunk, where their buffers don't take too much VMEM."""
CHUNK_BYTES = 4 << 20
"""VMEM for the two chunks of keys and values in flight."""
VMEM_BYTES = 14 << 20
"""VMEM for everything; the smallest of the TPUs in use (v4) has 16 MiB."""
SCORES = 32 << 10
"""Scores computed at once, of several heads if need be: they fill half of the registers, and the
latencies of one head's products hide behind the others'."""
IDS = 128
"""Page ids fetched at once: HBM holds the page table in tiles of so many columns."""


class Items(NamedTuple):
    """Runs of queries of one lane, int32 [n + 1], the used ones first; the last one never is.

    Attributes:
        row: the lane's row in the page table.
        token, length: the queries are ``q[token : token + length]``.
        position: of the first query in its lane.
        first, end: the chunks of keys that the queries see.
        totals: [2], the items in use, and their chunks.
    """

    row: jax.Array
    token: jax.Array
    length: jax.Array
    position: jax.Array
    first: jax.Array
    end: jax.Array
    totals: jax.Array


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
    interpret: Any = False,
) -> jax.Array:
    """See ``api.paged_attention``; ``interpret`` (``pltpu.InterpretParams``) simulates a TPU."""
    refuse(variant)
    if not interpret and not can_lower_mosaic_tpu():
        raise NotImplementedError("the Mosaic kernel needs a TPU")
    if {q.dtype, k_pages.dtype} - {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        raise NotImplementedError(f"the Mosaic kernel has no {q.dtype}, {k_pages.dtype} version")
    tokens, heads, size = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    if page_size % 8:
        raise NotImplementedError("TPUs copy whole tiles of 8 slots, so pages must hold such")
    q = q.reshape(tokens, kv_heads, heads // kv_heads, size)
    # Depends on nothing but the table, so that XLA does it once for all layers.
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % IDS)))
    attend = functools.partial(
        _attend,
        cache=(table, k_pages, v_pages),
        batch=batch,
        scale=scale,
        window=sliding_window,
        interpret=interpret,
    )
    if batch.tile_lane.shape[0]:
        q = attend(q, lane=batch.tile_lane, start=batch.tile_start, tokens=batch.tile_tokens)
    lanes = jnp.arange(batch.row.shape[0], dtype=jnp.int32)
    # Lanes with more than one query start behind their end here: the tiles hold them.
    start = jnp.where(batch.query_len == 1, 0, batch.query_len)
    return attend(q, lane=lanes, start=start, tokens=1).reshape(tokens, heads, size)


def _plan(
    batch: AttentionBatch,
    lane: jax.Array,
    start: jax.Array,
    tokens: int,
    window: int | None,
    keys: int,
) -> Items:
    """The items of up to ``tokens`` queries each, from query ``start`` of ``lane`` on."""
    count = jnp.clip(batch.query_len[lane] - start, 0, tokens)
    used = count > 0
    order = jnp.argsort(~used, stable=True)
    lane, start, count, used = (array[order] for array in (lane, start, count, used))
    position = batch.kv_len[lane] - batch.query_len[lane] + start
    lowest = 0 if window is None else jnp.maximum(position - window + 1, 0)
    first = jnp.where(used, lowest // keys, 0)
    end = jnp.where(used, (position + count + keys - 1) // keys, 0)
    totals = jnp.stack([used.sum(), (end - first).sum()]).astype(jnp.int32)
    row, token = batch.row[lane], batch.query_start[lane] + start

    def padded(column: jax.Array) -> jax.Array:
        return jnp.pad(column, (0, 1)).astype(jnp.int32)

    return Items(
        *(padded(row), padded(token), padded(count), padded(position)),
        *(padded(first), padded(end), totals),
    )


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """VMEM that an array takes: its last two axes are padded to tiles."""
    *others, rows, columns = shape
    packed = 4 // jnp.dtype(dtype).itemsize
    rows, columns = -(-rows // packed) * packed, -(-columns // 128) * 128
    rows = rows if rows < 8 else -(-rows // 8) * 8
    return math.prod(others) * rows * columns * jnp.dtype(dtype).itemsize


def _buffers(
    q: jax.Array, k_pages: jax.Array, tokens: int, kv_heads: int
) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes in VMEM of a program for so many KV heads; the first is a chunk's."""
    _, _, group, size = q.shape
    page_size, dtype = k_pages.shape[2], k_pages.dtype
    page_bytes = _bytes((kv_heads, page_size, size), dtype)
    most = min(CHUNK_KEYS // page_size, CHUNK_BYTES // (4 * page_bytes), IDS)
    pages = 1 << (max(most, 1).bit_length() - 1)  # so that a chunk's ids lie in one tile
    chunk = ((2, kv_heads, pages * page_size, size), dtype)
    rows = tokens * group
    return [
        chunk,  # keys
        chunk,  # values
        ((2, tokens, kv_heads, group, size), q.dtype),  # queries as they come
        ((kv_heads, rows, size), dtype),  # queries as rows
        ((tokens, kv_heads, group, size), q.dtype),  # outputs as they go
        ((kv_heads, rows, size), jnp.float32),  # weighted values
        ((kv_heads, rows, 1), jnp.float32),  # running maximum
        ((kv_heads, rows, 1), jnp.float32),  # running sum
    ]


def _attend(
    q: jax.Array,
    *,
    cache: tuple[jax.Array, ...],
    batch: AttentionBatch,
    lane: jax.Array,
    start: jax.Array,
    tokens: int,
    scale: float,
    window: int | None,
    interpret: Any,
) -> jax.Array:
    """Replaces the queries of the items in q [T, kv_heads, group, D] by their outputs.

    A program handles as many KV heads as fit into VMEM; most often that's all.
    """
    k_pages = cache[1]
    kv_heads, group, _ = q.shape[1:]
    shares = [n for n in range(kv_heads, 0, -1) if kv_heads % n == 0]
    cuts = (_buffers(q, k_pages, tokens, share) for share in shares)
    buffers = next((cut for cut in cuts if sum(_bytes(*b) for b in cut) <= VMEM_BYTES), None)
    if buffers is None:
        raise NotImplementedError(f"{tokens} queries of {group} heads don't fit into VMEM")
    (_, share, keys, _), _ = buffers[0]
    items = _plan(batch, lane, start, tokens, window, keys)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, share=share, scale=scale * LOG2_E, window=window),
        name="paged_decode" if tokens == 1 else "paged_prefill",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(kv_heads // share,),
            in_specs=[hbm] * 4,
            out_specs=hbm,
            scratch_shapes=[
                pltpu.SMEM((2, IDS), jnp.int32),
                *(pltpu.VMEM(*buffer) for buffer in buffers),
                *[pltpu.SemaphoreType.DMA((2,))] * 3,
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases={len(items) + 3: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES + (2 << 20)),
        interpret=interpret,
    )(*items, *cache, q)


def _pieces(count: jax.Array, tokens: int, most: int, do: Any) -> None:
    """Calls ``do(offset, size)`` for pieces of powers of two that make up ``count`` <= tokens."""
    if tokens == 1:
        do(0, 1)
        return
    for bit in range(min(tokens, most).bit_length()):
        size = 1 << bit
        pl.when(count & size != 0)(functools.partial(do, count & -(2 * size), size))


def _kernel(
    row_ref, token_ref, length_ref, position_ref, first_ref, end_ref, totals_ref,
    table_ref, k_ref, v_ref, _, q_ref,
    ids, k_buffer, v_buffer, q_buffer, q_rows, out_buffer, values, top, total,
    ids_ready, pages_ready, q_ready, out_done,
    *, tokens, share, scale, window,
):  # fmt: skip
    group, size = q_ref.shape[2:]
    page_size, keys, rows = k_ref.shape[2], k_buffer.shape[2], tokens * group
    pages = keys // page_size
    most = max(1, SCORES // (-(-rows // 8) * 8 * keys))
    together = next(n for n in range(min(most, share), 0, -1) if share % n == 0)
    own_heads = pl.ds(pl.program_id(0) * share, share)
    num_items, num_chunks = totals_ref[0], totals_ref[1]

    def lowest(item):
        """The first key that the item's queries see."""
        return 0 if window is None else jnp.maximum(position_ref[item] - window + 1, 0)

    def behind(item):
        """The first key that the item's queries don't see any more."""
        return position_ref[item] + length_ref[item]

    def after(item, chunk):
        """The place of the next chunk of the sequence."""
        ends = chunk + 1 >= end_ref[item]
        following = jnp.minimum(item + 1, num_items)
        return jnp.where(ends, following, item), jnp.where(ends, first_ref[following], chunk + 1)

    def ids_copy(slot, item, chunk):
        column = pl.multiple_of(lax.div(chunk * pages, IDS) * IDS, IDS)
        source = table_ref.at[row_ref[item], pl.ds(column, IDS)]
        return pltpu.make_async_copy(source, ids.at[slot], ids_ready.at[slot])

    def for_pages(slot, item, chunk, page_id, do):
        """Calls ``do`` with each copy of a page of the chunk that holds keys to be seen."""
        start = jnp.maximum(lax.div(lowest(item), page_size) - chunk * pages, 0)
        stop = lax.div(behind(item) + page_size - 1, page_size) - chunk * pages

        def page(i, _):
            place = pl.ds(pl.multiple_of(i * page_size, 8), page_size)
            for source, buffer in ((k_ref, k_buffer), (v_ref, v_buffer)):
                target = buffer.at[slot, :, place]
                copied = source.at[page_id(i), own_heads]
                do(pltpu.make_async_copy(copied, target, pages_ready.at[slot]))
            return 0

        lax.fori_loop(start, jnp.minimum(stop, pages), page, 0)

    def for_queries(item, do):
        def piece(offset, length):
            source = q_ref.at[pl.ds(token_ref[item] + offset, length), own_heads]
            slot = lax.rem(item, 2)
            target = q_buffer.at[slot, pl.ds(offset, length)]
            do(pltpu.make_async_copy(source, target, q_ready.at[slot]))

        _pieces(length_ref[item], tokens, q_ref.shape[0], piece)

    def for_outputs(item, do):
        def piece(offset, length):
            source = out_buffer.at[pl.ds(offset, length)]
            target = q_ref.at[pl.ds(token_ref[item] + offset, length), own_heads]
            do(pltpu.make_async_copy(source, target, out_done))

        _pieces(length_ref[item], tokens, q_ref.shape[0], piece)

    start, wait = lambda copy: copy.start(), lambda copy: copy.wait()

    def begin(item):
        for_queries(item, wait)

        def head(h, _):
            own = q_buffer[lax.rem(item, 2), :, h].reshape(rows, size)
            q_rows[h] = own.astype(q_rows.dtype)
            return 0

        lax.fori_loop(0, share, head, 0)
        values[...] = jnp.zeros_like(values)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def finish(item):
        pl.when(item > 0)(lambda: for_outputs(item - 1, wait))

        def head(h, _):
            out = values[h] / total[h]
            out_buffer[:, h] = out.reshape(tokens, group, size).astype(out_buffer.dtype)
            return 0

        lax.fori_loop(0, share, head, 0)
        for_outputs(item, start)

    def compute(slot, item, chunk):
        low, end = lowest(item), behind(item)
        begins = chunk * keys

        @pl.when((begins < low) | (begins + keys > end))
        def _():
            # What no query sees may be anything, another request's NaN too, and 0 times NaN is NaN.
            key = begins + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
            own = (key >= low) & (key < end)

            def head(h, _):
                v_buffer[slot, h] = jnp.where(own, v_buffer[slot, h], 0)
                return 0

            lax.fori_loop(0, share, head, 0)

        row = lax.broadcasted_iota(jnp.int32, (rows, keys), 0)
        query = position_ref[item] + lax.div(row, group)
        distance = query - begins - lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        precision = lax.Precision.HIGHEST if k_ref.dtype == jnp.float32 else None

        def heads(i, _):
            own = pl.ds(i * together, together)
            scores = lax.dot_general(
                q_rows[own], k_buffer[slot, own], (((2,), (2,)), ((0,), (0,))),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            scores = jnp.where(seen[None], scores * scale, MASKED)
            new_top = jnp.maximum(top[own], scores.max(2, keepdims=True))
            shrink = jnp.exp2(top[own] - new_top)
            weights = jnp.exp2(scores - new_top)
            added = lax.dot_general(
                weights.astype(v_ref.dtype), v_buffer[slot, own], (((2,), (1,)), ((0,), (0,))),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            values[own] = values[own] * shrink + added
            total[own] = total[own] * shrink + weights.sum(2, keepdims=True)
            top[own] = new_top
            return 0

        lax.fori_loop(0, share // together, heads, 0)

    def step(i, places):
        fetched, loaded, computed = places  # (item, chunk) in the three stages

        @pl.when(i < num_chunks)
        def _():
            ids_copy(lax.rem(i, 2), *fetched).start()

        @pl.when((i >= 1) & (i <= num_chunks))
        def _():
            slot, (item, chunk) = lax.rem(i + 1, 2), loaded
            ids_copy(slot, *loaded).wait()
            tile_start = lax.rem(chunk * pages, IDS)
            for_pages(slot, item, chunk, lambda i: ids[slot, tile_start + i], start)
            pl.when(chunk == first_ref[item])(lambda: for_queries(item, start))

        @pl.when(i >= 2)
        def _():
            slot, (item, chunk) = lax.rem(i, 2), computed
            pl.when(chunk == first_ref[item])(lambda: begin(item))
            # Waiting asks for sizes only, and other ids are on their way to where these stood.
            for_pages(slot, item, chunk, lambda i: 0, wait)
            compute(slot, item, chunk)
            pl.when(chunk + 1 == end_ref[item])(lambda: finish(item))

        return after(*fetched), fetched, loaded

    origin = (jnp.int32(0), first_ref[0])
    lax.fori_loop(0, jnp.where(num_chunks > 0, num_chunks + 2, 0), step, (origin,) * 3)
    pl.when(num_items > 0)(lambda: for_outputs(num_items - 1, wait))
