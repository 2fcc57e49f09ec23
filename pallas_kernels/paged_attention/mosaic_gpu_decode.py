"""The kernels for decoding (lanes with one query each) on Hopper GPUs.

A unit of work is a decode item and a KV head: one query's GQA group over a range of its lane's
keys. Each block has two streams of units, a producer and a consumer each: the producer, a
warpgroup, lets the copy engine fetch queries and pages of keys and values into rings of shared
memory; the consumer multiplies them on the tensor cores. Blocks are persistent, so that the
producer fetches the next unit's keys while the consumer finishes the last one; the longest units
come first.

A tile of queries is the 64 rows of a wgmma, of which only the group's are used. With 64 keys in a
tile that is 64 x 64 x 4 x head_size FLOPs for 4 x 64 x head_size bytes in bfloat16: 64 FLOPs per
byte, or about 280 TFLOP/s at 4.3 TB/s. The tensor cores have that to spare, and the registers'
layouts are those of the prefill kernel. What a row holds that is no query of the group goes
nowhere.

The units of a lane that has several items leave unfinished results in device memory, which a second
kernel adds up in the order of the keys, so that results don't depend on timing (log-sum-exp
rescaling, FlashDecoding, Dao et al. 2023).

Neither the speed nor the numerics have been measured on a GPU yet: the kernels pass JAX's
interpreter, which knows no register layouts and no tensor cores, and lower for CUDA.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.mosaic_gpu_prefill import (
    LOWEST,
    PRODUCER_REGISTERS,
    _multiply_values,
    _product,
)
from pallas_kernels.paged_attention.mosaic_gpu_shape import (
    COMPILER_PARAMS,
    CONSUMER_ROWS,
    PART_COLUMNS,
    PARTS_AT_ONCE,
    DecodeShape,
    decode_memory,
    merge_memory,
)

BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""The registers' layout of a vector with one element for each row of a WGMMA tile."""
CONSUMER_REGISTERS = 208  # of each thread; 2 x (208 + PRODUCER_REGISTERS) x 128 threads fit a core


class _Unit(NamedTuple):
    """One piece of work: a decode item and a KV head; int32 scalars."""

    head: Any
    item: Any
    row: Any  # of the page table
    token: Any  # in q
    first: Any  # key that the query sees
    end: Any  # behind the last one
    whole: Any  # 1 if the lane has no other item

    def tiles(self, shape: DecodeShape) -> tuple[Any, Any]:
        """Where the tiles of keys begin, at a page's start, and their number."""
        start = self.first - lax.rem(self.first, shape.page_size)
        steps = lax.div(self.end - start + shape.keys - 1, shape.keys)
        return start, jnp.where(self.end > self.first, steps, 0)

    def query(self, shape: DecodeShape) -> Any:
        """The row of the group's first query, counting heads within tokens."""
        return self.token * shape.heads + self.head * shape.group


class _Lane(NamedTuple):
    """Columns of a tile of 64 rows of a lane's unfinished results; int32 scalars."""

    tile: Any  # which 64 rows and columns
    token: Any  # in q
    first_item: Any
    count: Any  # of items


def decode(
    shape: DecodeShape,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
) -> jax.Array:
    """See ``mosaic_gpu.decode``."""
    count = batch.decode_lane.shape[0]
    vectors = jax.ShapeDtypeStruct((count, shape.padded_rows), jnp.float32)
    values = jax.ShapeDtypeStruct((count, shape.padded_rows, shape.head_size), jnp.float32)
    rows = q.reshape(-1, shape.head_size)
    # The copy engine takes no fewer rows than a swizzled tile has.
    rows = jnp.pad(rows, ((0, max(0, shape.members - len(rows))), (0, 0)))
    out = jax.new_ref(rows, memory_space=plgpu.GMEM)
    pools = (pages.reshape(-1, *pages.shape[2:]) for pages in (k_pages, v_pages))
    attend = _kernel(
        shape,
        "paged_decode",
        functools.partial(_decode_kernel, shape),
        decode_memory(shape),
        threads=2 * shape.streams,
        out_type=(values, vectors, vectors),
    )
    parts = attend(*_item_facts(shape, batch), page_table, *pools, out)
    merge = _kernel(
        shape, "paged_decode_merge", functools.partial(_merge_kernel, shape), merge_memory(shape)
    )
    merge(*_lane_facts(batch), *parts, out)
    return out[...][: q.shape[0] * shape.heads].reshape(q.shape)


def _kernel(
    shape: DecodeShape,
    name: str,
    body: Callable,
    memory: dict[str, Any],
    threads: int = 1,
    out_type: tuple = (),
) -> Callable:
    """A kernel with one block on each core; ``body`` takes arrays, outputs and ``memory``."""
    mesh = plgpu.Mesh(
        grid=(shape.cores,),
        grid_names=("core",),
        num_threads=threads,
        thread_name="role",
        kernel_name=name,
    )

    def run(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), collective_axes="role", **memory)

    return pl.kernel(
        run,
        out_type,
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        interpret=shape.interpret,
    )


def _item_facts(shape: DecodeShape, batch: AttentionBatch) -> tuple[jax.Array, jax.Array]:
    """What the kernel must know of each item: int32 [D, fields of _Unit but head], the items with
    most keys first, and the number of those in use [1]. Equal in all layers, so XLA makes it once
    per step."""
    lane, end = batch.decode_lane, batch.decode_end
    used = end > batch.decode_start
    first = batch.decode_start
    if shape.window is not None:
        first = jnp.maximum(first, batch.kv_len[lane] - shape.window)
    facts = [
        jnp.arange(lane.shape[0], dtype=jnp.int32),
        batch.row[lane],
        batch.query_start[lane],
        first,
        end,
        (batch.decode_count[lane] == 1).astype(jnp.int32),
    ]
    keys = jnp.where(used, jnp.maximum(end - first, 0), -1)
    order = jnp.argsort(-keys)
    return jnp.stack(facts, axis=1)[order], jnp.sum(used, dtype=jnp.int32)[None]


def _lane_facts(batch: AttentionBatch) -> tuple[jax.Array, jax.Array]:
    """What the merge must know of each lane: int32 [L, fields of _Lane but tile], those with
    several items first, and their number [1]."""
    several = batch.decode_count > 1
    facts = jnp.stack([batch.query_start, batch.decode_first, batch.decode_count], axis=1)
    return facts[jnp.argsort(~several)], jnp.sum(several, dtype=jnp.int32)[None]


def _for_each(facts, used, inner: int, first, step: int, unit: type[_Unit | _Lane], body: Callable):
    """Runs ``count = body(nth, unit, count)``, from a count of 0, for every ``step``-th of the
    used facts x ``inner``, from number ``first`` on; returns the number of runs and the count.

    The facts of the next unit are loaded before this one is worked on.
    """
    units = used[0] * inner

    def load(nth):
        index = jnp.minimum(first + nth * step, jnp.maximum(units - 1, 0))
        row = lax.div(index, inner)
        return unit(lax.rem(index, inner), *(facts[row, i] for i in range(len(unit._fields) - 1)))

    def run(nth, carry):
        current, count = carry
        following = load(nth + 1)
        return following, body(nth, current, count)

    runs = jnp.maximum(lax.div(units - first + step - 1, step), 0)
    _, count = lax.fori_loop(0, runs, run, (load(0), jnp.int32(0)))
    return runs, count


# --- attention ----------------------------------------------------------------------------------


def _decode_kernel(
    shape: DecodeShape, facts, used, table, k, v, out, values, top, total, **scratch
) -> None:
    role = lax.axis_index("role")
    block = types.SimpleNamespace(stream=lax.rem(role, shape.streams), **scratch)
    block.q_tiled, block.q_plain = shape.query_refs(block.q_smem)
    parts = (values, top, total)
    # Here, since a warp may not ask for it.
    first = lax.axis_index("core") + block.stream * shape.cores

    def for_each_unit(step: Callable) -> tuple[Any, Any]:
        streams = shape.cores * shape.streams
        return _for_each(facts, used, shape.kv_heads, first, streams, _Unit, step)

    def produce(warp: Any) -> None:
        step = functools.partial(_produce, shape, block, warp, table, k, v, out)
        units, tiles = for_each_unit(step)
        # Not before the consumer is done with the barriers.
        waits = [(units, block.q_free.at[block.stream], 0)]
        for slot in range(shape.key_slots):
            at = block.stream * shape.key_slots + slot
            waits += [(tiles, block.k_free.at[at], slot), (tiles, block.v_free.at[at], slot)]
        for uses, free, slot in waits:
            pl.when(uses > slot)(functools.partial(plgpu.barrier_wait, free))

    @pl.when(role >= shape.streams)
    def _():
        if shape.streams > 1:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        if shape.producer_warps == 1:
            produce(0)
        else:
            warps = plgpu.WarpMesh(axis_name="warp")
            pl.core_map(warps)(lambda: produce(lax.axis_index("warp")))

    @pl.when(role < shape.streams)
    def _():
        if shape.streams > 1:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        for_each_unit(functools.partial(_consume, shape, block, out, parts))
        plgpu.wait_smem_to_gmem(0)


def _produce(shape: DecodeShape, block, warp, table, k, v, q, nth, unit: _Unit, count):
    """Fetches a unit's queries, keys and values; ``count`` tiles of keys came before."""
    start, steps = unit.tiles(shape)
    last_page = lax.div(unit.end - 1, shape.page_size)

    def mine(i: int) -> Callable:
        """Runs a function if the i-th of several copies is this warp's."""
        if shape.producer_warps == 1:
            return lambda function: function()
        return pl.when(warp == i % shape.producer_warps)

    @pl.when(nth > 0)
    def _():
        plgpu.barrier_wait(block.q_free.at[block.stream])

    for i in range(shape.parts):

        @mine(i)
        def _(i=i):
            # Behind the group these are other queries, perhaps overwritten by their outputs.
            plgpu.copy_gmem_to_smem(
                q.at[pl.ds(unit.query(shape), shape.members), shape.part(i)],
                block.q_plain.at[block.stream, i, pl.ds(0, shape.members)],
                block.q_full.at[block.stream],
            )

    def fetch(pool, ids, smem, full, free, slot, count):
        at = block.stream * shape.key_slots + slot

        @pl.when(count >= shape.key_slots)
        def _():
            plgpu.barrier_wait(free.at[at])

        for i, page in enumerate(ids):

            @mine(i)
            def _(i=i, page=page):
                rows = pl.ds(i * shape.page_size, shape.page_size)
                plgpu.copy_gmem_to_smem(
                    pool.at[page * shape.kv_heads + unit.head],
                    smem.at[block.stream, slot, rows],
                    full.at[at],
                )

    def step(i, count):
        slot = lax.rem(count, shape.key_slots)
        first = lax.div(start, shape.page_size) + i * shape.pages
        # Instead of pages behind the unit's end the last one again: by then it is in the L2 cache.
        columns = (jnp.minimum(first + j, last_page) for j in range(shape.pages))
        ids = [table[unit.row, column] for column in columns]
        fetch(k, ids, block.k_smem, block.k_full, block.k_free, slot, count)
        fetch(v, ids, block.v_smem, block.v_full, block.v_free, slot, count)
        return count + 1

    return lax.fori_loop(0, steps, step, count)


def _consume(shape: DecodeShape, block, out, parts, nth, unit: _Unit, count):
    """Computes a unit and stores its result; ``count`` tiles of keys came before."""
    start, steps = unit.tiles(shape)
    q_parts = [block.q_tiled.at[block.stream, i] for i in range(shape.parts)]
    scores_shape = (CONSUMER_ROWS, shape.keys)
    plgpu.barrier_wait(block.q_full.at[block.stream])

    def step(i, carry):
        values, top, total = carry
        slot = lax.rem(count + i, shape.key_slots)
        at = block.stream * shape.key_slots + slot
        first_key = start + i * shape.keys
        plgpu.barrier_wait(block.k_full.at[at])
        scores = _multiply_keys(shape, q_parts, block.k_smem.at[block.stream, slot])
        plgpu.barrier_arrive(block.k_free.at[at])
        key = first_key + shape.iota(scores_shape, 1)
        # Not LOWEST: times the scale it may be rounded, so it wouldn't cancel exactly below.
        scores = jnp.where((key >= unit.first) & (key < unit.end), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * shape.scale)
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * shape.scale - lax.broadcast_in_dim(new_top, scores_shape, [0]))
        values = values * lax.broadcast_in_dim(shrink, values.shape, [0])
        total = total * shrink + weights.sum(axis=1)
        v_rows = block.v_smem.at[block.stream, slot]
        plgpu.barrier_wait(block.v_full.at[at])
        _clear_unseen(shape, unit, v_rows, first_key)
        weights = weights.astype(shape.dtype)
        values = _multiply_values(shape, values, weights, v_rows, lambda: None)  # type: ignore[arg-type]
        plgpu.barrier_arrive(block.v_free.at[at])
        return values, new_top, total

    carry = _empty_carry(shape, shape.head_size)
    values, top, total = lax.fori_loop(0, steps, step, carry)
    plgpu.barrier_arrive(block.q_free.at[block.stream])

    @pl.when(unit.whole == 1)
    def _():
        _store_whole(shape, block, unit, values, total, out)

    @pl.when(unit.whole == 0)
    def _():
        _store_part(shape, block, unit, (values, top, total), parts)

    return count + steps


def _empty_carry(shape: DecodeShape, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of 64 rows: weighted values, running maximum, running sum, before the first key."""
    return (
        shape.full((CONSUMER_ROWS, width), 0.0),
        shape.full((CONSUMER_ROWS,), LOWEST, BY_ROW),
        shape.full((CONSUMER_ROWS,), 0.0, BY_ROW),
    )


def _multiply_keys(shape: DecodeShape, q_parts, k_rows) -> jax.Array:
    """q k^T on the tensor cores."""
    pairs = [(part, k_rows.at[:, shape.part(i)]) for i, part in enumerate(q_parts)]
    if shape.interpret:
        products = [_product(part[...], k_part[...].T) for part, k_part in pairs]
        plgpu.commit_smem()
        return functools.reduce(jnp.add, products)

    def multiply(scores):
        for part, k_part in pairs:
            plgpu.wgmma(scores, part, plgpu.transpose_ref(k_part, (1, 0)))
        return scores[...]

    return pl.run_scoped(multiply, plgpu.ACC((CONSUMER_ROWS, shape.keys), jnp.float32))


def _clear_unseen(shape: DecodeShape, unit: _Unit, v_rows, first_key) -> None:
    """Zeroes values of a tile that the query doesn't see: their weights are 0, but a NaN that
    somebody left there would still reach the sum."""

    @pl.when((first_key < unit.first) | (first_key + shape.keys > unit.end))
    def _():
        key = first_key + shape.iota((shape.keys, shape.head_size), 0)
        seen = (key >= unit.first) & (key < unit.end)
        v_rows[...] = jnp.where(seen, v_rows[...], jnp.zeros((), shape.dtype))
        plgpu.commit_smem()


def _store_whole(shape: DecodeShape, block, unit: _Unit, values, total, out) -> None:
    """Starts copies of the group's outputs to the place of its queries."""
    values = values * lax.broadcast_in_dim(1 / total, values.shape, [0])
    values = values.astype(shape.dtype)
    smem = block.out_smem.at[block.stream]
    for i in range(shape.parts):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = values[:, i * shape.columns : (i + 1) * shape.columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            smem.at[pl.ds(0, shape.group)],
            out.at[pl.ds(unit.query(shape), shape.group), shape.part(i)],
        )


def _store_part(shape: DecodeShape, block, unit: _Unit, carry, parts) -> None:
    """Starts copies of an unfinished result."""
    (values, top, total), (values_out, top_out, total_out) = carry, parts
    some, rows = pl.ds(0, shape.members), pl.ds(unit.head * shape.members, shape.members)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    vectors = ((top, block.top_smem, top_out), (total, block.total_smem, total_out))
    for vector, smem, _ in vectors:
        smem[block.stream] = vector
    smem = block.values_smem.at[block.stream]
    for first in range(0, shape.head_size, PART_COLUMNS):
        if first:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = values[:, first : first + PART_COLUMNS]
        plgpu.commit_smem()
        columns = pl.ds(first, PART_COLUMNS)
        plgpu.copy_smem_to_gmem(smem.at[some], values_out.at[unit.item, rows, columns])
    for _, vector_smem, vector_out in vectors:
        plgpu.copy_smem_to_gmem(vector_smem.at[block.stream, some], vector_out.at[unit.item, rows])


# --- merge --------------------------------------------------------------------------------------


def _merge_kernel(shape: DecodeShape, facts, used, values, top, total, out, **scratch) -> None:
    block = types.SimpleNamespace(**scratch)
    tiles = shape.padded_rows // CONSUMER_ROWS * (shape.head_size // PART_COLUMNS)
    step = functools.partial(_merge, shape, block, (values, top, total), out)
    _for_each(facts, used, tiles, lax.axis_index("core"), shape.cores, _Lane, step)
    plgpu.wait_smem_to_gmem(0)


def _merge(shape: DecodeShape, block, parts, out, nth, lane: _Lane, count):
    """Merges a tile of a lane's unfinished results; ``count`` results came before."""
    across = shape.head_size // PART_COLUMNS
    row_tile, column_tile = lax.div(lane.tile, across), lax.rem(lane.tile, across)
    rows = pl.ds(row_tile * CONSUMER_ROWS, CONSUMER_ROWS)
    columns = pl.ds(column_tile * PART_COLUMNS, PART_COLUMNS)

    def fetch(i):
        values, top, total = parts
        item, slot = lane.first_item + i, lax.rem(count + i, PARTS_AT_ONCE)
        for source, smem in (
            (values.at[item, rows, columns], block.values_smem),
            (top.at[item, rows], block.top_smem),
            (total.at[item, rows], block.total_smem),
        ):
            plgpu.copy_gmem_to_smem(source, smem.at[slot], block.full.at[slot])

    pl.loop(0, jnp.minimum(lane.count, PARTS_AT_ONCE))(fetch)

    def step(i, carry):
        values, top, total = carry
        slot = lax.rem(count + i, PARTS_AT_ONCE)
        plgpu.barrier_wait(block.full.at[slot])
        part = block.values_smem[slot]
        part_top = shape.laid_out(block.top_smem[slot], BY_ROW)
        part_total = shape.laid_out(block.total_smem[slot], BY_ROW)
        plgpu.commit_smem()  # every thread has read the slot
        pl.when(i + PARTS_AT_ONCE < lane.count)(lambda: fetch(i + PARTS_AT_ONCE))
        new_top = jnp.maximum(top, part_top)
        old, new = jnp.exp2(top - new_top), jnp.exp2(part_top - new_top)
        values = values * lax.broadcast_in_dim(old, values.shape, [0])
        values = values + part * lax.broadcast_in_dim(new, values.shape, [0])
        return values, new_top, total * old + part_total * new

    carry = _empty_carry(shape, PART_COLUMNS)
    values, _, total = lax.fori_loop(0, lane.count, step, carry)
    values = values * lax.broadcast_in_dim(1 / total, values.shape, [0])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    block.out_smem[...] = values.astype(shape.dtype)
    plgpu.commit_smem()
    heads = CONSUMER_ROWS // shape.members
    for i in range(heads):
        head = row_tile * heads + i

        @pl.when(head < shape.kv_heads)
        def _(i=i, head=head):
            query = lane.token * shape.heads + head * shape.group
            plgpu.copy_smem_to_gmem(
                block.out_smem.at[pl.ds(i * shape.members, shape.group)],
                out.at[pl.ds(query, shape.group), columns],
            )

    return count + lane.count
