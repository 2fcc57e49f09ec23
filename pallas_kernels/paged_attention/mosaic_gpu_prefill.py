"""The kernel for tiles of queries (prompts and their chunks) on Hopper GPUs.

The schedule is FlashAttention-3's (Shah et al. 2024): each block has a producer, a warpgroup that
lets the copy engine fetch queries, keys and values into rings of shared memory, and two consumers,
warpgroups that take turns on the tensor cores while the other one computes its softmax. A tile of
queries is up to 128 rows, 64 for each consumer: the tile's tokens of one query head that shares the
KV head, then those of the next. Blocks are persistent: the producer fetches the next tile's queries
and first keys while the consumers finish the last one.

A tile's outputs take its queries' place, in shared memory and in ``q``.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.mosaic_gpu_shape import (
    CHUNK,
    COMPILER_PARAMS,
    CONSUMER_ROWS,
    CONSUMERS,
    Shape,
    shared_memory,
)

LOWEST = -1e30  # a running maximum before any score; finite, so that differences are too
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of each thread


class _Tile(NamedTuple):
    """One piece of work: a tile of queries and a KV head; int32 scalars."""

    head: Any
    row: Any
    token: Any  # of the first query, in q
    tokens: Any  # queries from there that belong to the lane
    position: Any  # of the first query
    kv_len: Any

    def keys(self, shape: Shape) -> tuple[Any, Any]:
        """Where the tiles of keys begin that any query sees, and their number."""
        start = jnp.int32(0)
        if shape.window is not None:
            first = jnp.maximum(self.position - shape.window + 1, 0)
            start = lax.div(first, shape.keys) * shape.keys
        end = jnp.minimum(self.kv_len, self.position + shape.tile_tokens)
        return start, lax.div(end - start + shape.keys - 1, shape.keys)


def prefill(
    shape: Shape,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
) -> jax.Array:
    """See ``mosaic_gpu.prefill``."""
    mesh = plgpu.Mesh(
        grid=(shape.cores,),
        grid_names=("core",),
        num_threads=CONSUMERS + 1,
        thread_name="role",
        kernel_name="paged_prefill",
    )

    def body(*refs: Any) -> None:
        run = functools.partial(_kernel, shape, *refs)
        pl.run_scoped(run, collective_axes="role", **shared_memory(shape))

    # plgpu.kernel would be shorter, but passes no mutable arrays through.
    kernel = pl.kernel(
        body,
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        interpret=shape.interpret,
    )
    out = jax.new_ref(q, memory_space=plgpu.GMEM)
    pools = (pages.reshape(-1, *pages.shape[2:]) for pages in (k_pages, v_pages))
    kernel(*_tile_facts(batch), page_table, *pools, out)
    return out[...]


def _tile_facts(batch: AttentionBatch) -> tuple[jax.Array, jax.Array]:
    """What the kernel must know of each tile: int32 [C, fields of _Tile but head], and their number
    [1]. Equal in all layers, so XLA makes it once per step."""
    lane, offset = batch.tile_lane, batch.tile_start
    length, total = batch.query_len[lane], batch.kv_len[lane]
    facts = [
        batch.row[lane],
        batch.query_start[lane] + offset,
        length - offset,
        total - length + offset,
        total,
    ]
    return jnp.stack(facts, axis=1), jnp.sum(offset < length, dtype=jnp.int32)[None]


def _kernel(shape: Shape, facts, used, table, k, v, q, **scratch) -> None:
    block = types.SimpleNamespace(**scratch)
    block.q_tiled, block.q_plain = (block.q_smem,) * 2 if shape.interpret else block.q_smem
    core, role = lax.axis_index("core"), lax.axis_index("role")

    def for_each_tile(step: Callable) -> tuple[Any, Any]:
        return _for_each_tile(shape, core, facts, used, step)

    def produce(warp: Any) -> None:
        step = functools.partial(_produce, shape, block, warp, table, k, v, q)
        tiles, key_tiles = for_each_tile(step)
        # Not before the consumers are done with the barriers.
        waits = [
            *((tiles, block.q_free, slot) for slot in range(shape.query_slots)),
            *((key_tiles, block.k_free, slot) for slot in range(shape.key_slots)),
            *((key_tiles, block.v_free, slot) for slot in range(shape.key_slots)),
        ]
        for uses, free, slot in waits:
            pl.when(uses > slot)(functools.partial(plgpu.barrier_wait, free.at[slot]))

    @pl.when(role == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        if shape.producer_warps == 1:
            produce(0)
        else:
            warps = plgpu.WarpMesh(axis_name="warp")
            pl.core_map(warps)(lambda: produce(lax.axis_index("warp")))

    @pl.when(role < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        # The second consumer is half a step behind the first.
        pl.when(role == 1)(lambda: _hand_over(block.turn))
        tiles, _ = for_each_tile(functools.partial(_consume, shape, block, q, role))
        pl.when(role == 0)(lambda: _hand_over(block.turn))
        if shape.query_slots > 1:
            _release_queries(shape, block, tiles - 1)


def _for_each_tile(shape: Shape, core, facts, used, step: Callable) -> tuple[Any, Any]:
    """Runs ``count = step(nth, tile, count)`` for the tiles of block ``core``, from a count of 0;
    returns the number of tiles and the count.

    The blocks take turns over the tiles, which the plan sorts by their keys. The facts of the next
    tile are loaded before this one is worked on.
    """
    items = used[0] * shape.kv_heads

    def load(nth):
        item = jnp.minimum(core + nth * shape.cores, jnp.maximum(items - 1, 0))
        index, head = lax.div(item, shape.kv_heads), lax.rem(item, shape.kv_heads)
        return _Tile(head, *(facts[index, i] for i in range(len(_Tile._fields) - 1)))

    def body(nth, carry):
        tile, count = carry
        following = load(nth + 1)
        return following, step(nth, tile, count)

    mine = lax.div(items - core + shape.cores - 1, shape.cores)
    mine = jnp.maximum(mine, 0)
    _, count = lax.fori_loop(0, mine, body, (load(0), jnp.int32(0)))
    return mine, count


def _hand_over(turn) -> None:
    """Lets the other consumer have the tensor cores, and waits until it hands them back."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


# --- producer -----------------------------------------------------------------------------------


def _produce(shape: Shape, block, warp, table, k, v, q, nth, tile: _Tile, count):
    """Fetches a tile's queries, keys and values; ``count`` tiles of keys came before."""
    start, steps = tile.keys(shape)
    q_slot = lax.rem(nth, shape.query_slots)

    def mine(i: int) -> Callable:
        """Runs a function if the i-th of several copies is this warp's."""
        if shape.producer_warps == 1:
            return lambda function: function()
        return pl.when(warp == i % shape.producer_warps)

    @pl.when(nth >= shape.query_slots)
    def _():
        plgpu.barrier_wait(block.q_free.at[q_slot])

    pieces = itertools.product(range(shape.group), range(shape.parts))
    for i, (member, part) in enumerate(pieces):

        @mine(i)
        def _(member=member, part=part):
            # Behind the lane's end these are other queries, whose outputs aren't stored.
            tokens = pl.ds(tile.token, shape.tile_tokens)
            rows = pl.ds(member * shape.tile_tokens, shape.tile_tokens)
            plgpu.copy_gmem_to_smem(
                q.at[tokens, tile.head * shape.group + member, shape.part(part)],
                block.q_plain.at[q_slot, part, rows],
                block.q_full.at[q_slot],
            )

    def fetch(pool, ids, smem, full, free, slot, count):
        @pl.when(count >= shape.key_slots)
        def _():
            plgpu.barrier_wait(free.at[slot])

        for i, page in enumerate(ids):

            @mine(i)
            def _(i=i, page=page):
                plgpu.copy_gmem_to_smem(
                    pool.at[page * shape.kv_heads + tile.head],
                    smem.at[slot, pl.ds(i * shape.page_size, shape.page_size)],
                    full.at[slot],
                )

    def step(i, count):
        slot = lax.rem(count, shape.key_slots)
        first = lax.div(start, shape.page_size) + i * shape.pages
        # The last tile may reach over the table's edge; its keys there are masked.
        columns = (jnp.minimum(first + j, shape.table_width - 1) for j in range(shape.pages))
        ids = [table[tile.row, column] for column in columns]
        fetch(k, ids, block.k_smem, block.k_full, block.k_free, slot, count)
        fetch(v, ids, block.v_smem, block.v_full, block.v_free, slot, count)
        return count + 1

    return lax.fori_loop(0, steps, step, count)


# --- consumers ----------------------------------------------------------------------------------


def _consume(shape: Shape, block, out, role, nth, tile: _Tile, count):
    """Computes 64 rows of a tile and stores them; ``count`` tiles of keys came before."""
    start, steps = tile.keys(shape)
    q_slot = lax.rem(nth, shape.query_slots)
    row0 = role * CONSUMER_ROWS
    q_parts = [block.q_tiled.at[q_slot, i, pl.ds(row0, CONSUMER_ROWS)] for i in range(shape.parts)]
    rows, scores_shape = (CONSUMER_ROWS,), (CONSUMER_ROWS, shape.keys)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    token = (row0 + shape.iota(rows, 0, by_row)) & (shape.tile_tokens - 1)
    position = tile.position + token

    plgpu.barrier_wait(block.q_full.at[q_slot])
    plgpu.barrier_wait(block.k_full.at[lax.rem(count, shape.key_slots)])

    def step(i, carry, masked: bool):
        values, top, total = carry
        slot = lax.rem(count + i, shape.key_slots)
        first_key = start + i * shape.keys
        scores = _multiply_keys(shape, q_parts, block.k_smem.at[slot], block.turn)
        plgpu.barrier_arrive(block.k_free.at[slot])
        if masked:
            key = first_key + shape.iota(scores_shape, 1)
            own = lax.broadcast_in_dim(position, scores_shape, [0])
            seen = key <= own
            if shape.window is not None:
                seen = seen & (key > own - shape.window)
            # Not LOWEST: times the scale it may be rounded, so it wouldn't cancel exactly below.
            scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * shape.scale)
        shrink = jnp.exp2(top - new_top)
        shift = lax.broadcast_in_dim(new_top, scores_shape, [0])
        weights = jnp.exp2(scores * shape.scale - shift)
        values = values * lax.broadcast_in_dim(shrink, values.shape, [0])
        total = total * shrink + weights.sum(axis=1)
        weights = weights.astype(shape.dtype)
        # All of this before the tensor cores are taken back.
        values, total, new_top, weights = lax.optimization_barrier(
            (values, total, new_top, weights)
        )
        plgpu.barrier_arrive(block.turn)
        plgpu.barrier_wait(block.v_full.at[slot])
        if masked:
            _clear_unseen(shape, tile, block.v_smem.at[slot], first_key)
        plgpu.barrier_wait(block.turn)

        def wait_for_keys():
            @pl.when(i + 1 < steps)
            def _():
                plgpu.barrier_wait(block.k_full.at[lax.rem(count + i + 1, shape.key_slots)])

        values = _multiply_values(shape, values, weights, block.v_smem.at[slot], wait_for_keys)
        plgpu.barrier_arrive(block.v_free.at[slot])
        return values, new_top, total

    carry = (
        shape.full((CONSUMER_ROWS, shape.head_size), 0.0),
        shape.full(rows, LOWEST, by_row),
        shape.full(rows, 0.0, by_row),
    )
    whole, masked = functools.partial(step, masked=False), functools.partial(step, masked=True)
    # Tiles of keys that every query sees whole, from ``low`` to ``high``, need no mask.
    high = jnp.minimum(lax.div(tile.position + 1 - start, shape.keys), steps)
    low = jnp.int32(0)
    if shape.window is not None:
        first = tile.position + shape.tile_tokens - shape.window - start
        low = jnp.minimum(lax.div(jnp.maximum(first, 0) + shape.keys - 1, shape.keys), high)
        carry = lax.fori_loop(0, low, masked, carry)
    carry = lax.fori_loop(low, high, whole, carry)
    if shape.query_slots > 1:
        # By now the copies that the last tile's end left under way are done.
        _release_queries(shape, block, nth - 1)
    values, _, total = lax.fori_loop(high, steps, masked, carry)

    values = values * lax.broadcast_in_dim(1 / total, values.shape, [0])
    values = values.astype(shape.dtype)
    for i, part in enumerate(q_parts):
        part[...] = values[:, i * shape.columns : (i + 1) * shape.columns]
    plgpu.commit_smem()
    _store(shape, tile, q_parts, block.q_plain.at[q_slot], block.rest_smem.at[role], out, row0)
    if shape.query_slots == 1:
        _release_queries(shape, block, nth)
    return count + steps


def _release_queries(shape: Shape, block, nth) -> None:
    """Gives the nth tile's slot of queries back once its outputs, which lie there, are stored."""

    @pl.when(nth >= 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(block.q_free.at[lax.rem(nth, shape.query_slots)])


def _multiply_keys(shape: Shape, q_parts, k_rows, turn) -> jax.Array:
    """q k^T on the tensor cores, which are handed over once it is under way."""
    pairs = [(part, k_rows.at[:, shape.part(i)]) for i, part in enumerate(q_parts)]
    if shape.interpret:
        _hand_over(turn)
        products = [_product(part[...], k_part[...].T) for part, k_part in pairs]
        plgpu.commit_smem()
        return functools.reduce(jnp.add, products)

    def multiply(scores):
        for part, k_part in pairs:
            plgpu.wgmma(scores, part, plgpu.transpose_ref(k_part, (1, 0)))
        _hand_over(turn)
        return scores[...]

    return pl.run_scoped(multiply, plgpu.ACC((CONSUMER_ROWS, shape.keys), jnp.float32))


def _multiply_values(shape: Shape, values, weights, v_rows, meanwhile: Callable) -> jax.Array:
    """values + weights v on the tensor cores; calls ``meanwhile`` while they work."""
    if shape.interpret:
        meanwhile()
        values = values + _product(weights, v_rows[...])
        plgpu.commit_smem()
        return values

    def multiply(accumulator):
        plgpu.wgmma(accumulator, weights, v_rows)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(values))


def _product(a, b) -> jax.Array:
    """A product in the interpreter, which has no wgmma with an operand in registers or a transposed
    one. Unlike a wgmma's, its reads must be committed before the copy engine writes there again."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _clear_unseen(shape: Shape, tile: _Tile, v_rows, first_key) -> None:
    """Zeroes values that no query sees, behind the lane's end or before its window: their weights
    are 0, but a NaN that somebody left there would still reach the sum. Each consumer does it for
    itself, and writes what the other one writes."""
    step = CONSUMER_ROWS
    end = tile.kv_len - first_key
    start, needed = None, end < shape.keys
    if shape.window is not None:
        start = tile.position - shape.window + 1 - first_key
        needed = needed | (start > 0)

    @pl.when(needed)
    def _():
        for first in range(0, shape.keys, step):
            rows = v_rows.at[pl.ds(first, step)]
            key = first + shape.iota((step, shape.head_size), 0)
            seen = key < end
            if start is not None:
                seen = seen & (key >= start)
            rows[...] = jnp.where(seen, rows[...], jnp.zeros((), shape.dtype))
        plgpu.commit_smem()


def _store(shape: Shape, tile: _Tile, parts, plain, rest_smem, out, row0) -> None:
    """Starts copies of the lane's own rows, of this consumer's 64, to ``out``.

    A head's own rows are copied in pieces of 64, 32, 16 and 8. Up to 7 that remain at a lane's end
    are copied one by one, from unswizzled memory: no piece of swizzled memory is that small.
    """
    size = min(shape.tile_tokens, CONSUMER_ROWS)  # rows of one head

    def head_rows(first):
        """The query head of rows from ``first`` on, the first one's token, the rows to store."""
        row = row0 + first
        member, token = lax.div(row, shape.tile_tokens), lax.rem(row, shape.tile_tokens)
        own = jnp.clip(tile.tokens - token, 0, size)
        own = jnp.where(member < shape.group, own, 0)
        return tile.head * shape.group + member, tile.token + token, own

    for first in range(0, CONSUMER_ROWS, size):
        head, token, own = head_rows(first)
        piece = size
        while piece >= CHUNK:
            done = own & -(2 * piece)

            @pl.when((own & piece) != 0)
            def _(first=first, head=head, token=token, piece=piece, done=done):
                for i in range(shape.parts):
                    plgpu.copy_smem_to_gmem(
                        plain.at[i, pl.ds(row0 + first + done, piece)],
                        out.at[pl.ds(token + done, piece), head, shape.part(i)],
                    )

            piece //= 2

    @pl.when((tile.tokens < shape.tile_tokens) & (tile.tokens & (CHUNK - 1) != 0))
    def _():
        for i, part in enumerate(parts):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rest_smem[...] = part[...]
            plgpu.commit_smem()

            @pl.loop(0, CONSUMER_ROWS // size * CHUNK)
            def _(row, i=i):
                first = lax.div(row, CHUNK) * size
                head, token, own = head_rows(first)
                offset = (own & -CHUNK) + lax.rem(row, CHUNK)

                @pl.when(offset < own)
                def _():
                    plgpu.copy_smem_to_gmem(
                        rest_smem.at[first + offset],
                        out.at[token + offset, head, shape.part(i)],
                    )
