"""The kernel's first phase: rotation, the write of key and value, and attention.

A worker, which is a consumer with its ring, computes an item: a KV head's queries over a few pages
of its keys. Items leave their results in device memory, where they are added up for each query head
in the order of the keys, so that results don't depend on timing (log-sum-exp rescaling,
FlashDecoding, Dao et al. 2023). Workers who had no item do that first.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_attend as attend
from pallas_kernels.decode_layer import mosaic_gpu_exchange as exchange
from pallas_kernels.decode_layer import mosaic_gpu_heads as heads
from pallas_kernels.decode_layer import mosaic_gpu_ring as ring
from pallas_kernels.decode_layer.mosaic_gpu_shape import KEYS, ROWS, Attention, Plan, Shape


def _worker(shape: Shape, block: Any, consumer: Any) -> Any:
    """Neighbours in the order of items are on different multiprocessors."""
    return consumer * shape.blocks + block.index


def tiles(shape: Shape, block: Any, plan: Plan, consumer: int) -> Any:
    """How many tiles a consumer gets in this phase: two for each page."""
    worker = _worker(shape, block, consumer)

    def add(i, sum_):
        return sum_ + 2 * plan.item(shape.attention, worker + i * shape.workers)[3]

    count = plan.items(shape.attention, shape.workers, worker)
    return lax.fori_loop(0, count, add, jnp.int32(0))


def produce(shape: Shape, block: Any, refs: Any, plan: Plan) -> None:
    """Fetches the pages of the items."""
    spec, row, consumers = shape.attention, refs.row[0], range(shape.consumers)
    workers = [_worker(shape, block, consumer) for consumer in consumers]
    # The consumers' first pages are looked up together.
    numbers = [refs.page_table[row, _first_page(spec, plan, worker)] for worker in workers]
    for consumer in consumers:
        _fetch_pages(shape, block, refs, plan, consumer, workers[consumer], numbers[consumer])


def _first_page(spec: Attention, plan: Plan, number: Any) -> Any:
    """Of an item, if there is one."""
    return jnp.minimum(plan.item(spec, number)[2], plan.first_page + plan.pages - 1)


def _fetch_pages(
    shape: Shape, block: Any, refs: Any, plan: Plan, consumer: int, worker: Any, number: Any
) -> None:
    """Fetches the pages of a consumer's items, of which the first one has that number."""
    spec, row = shape.attention, refs.row[0]

    def item(i, carry):
        tile, number = carry
        own = worker + i * shape.workers
        head, _, first, pages = plan.item(spec, own)

        def page(p, carry):
            tile, number = carry
            # The next page is looked up before this one's slot is waited for.
            after = _first_page(spec, plan, own + shape.workers)
            following = refs.page_table[row, jnp.where(p + 1 < pages, first + p + 1, after)]
            for pool in (refs.k_pages, refs.v_pages):
                ring.fetch(shape, block, None, consumer, tile, pool.at[number, head])
                tile = tile + 1
            return tile, following

        return lax.fori_loop(0, pages, page, (tile, number))

    count = plan.items(spec, shape.workers, worker)
    lax.fori_loop(0, count, item, (jnp.int32(0), number))


def consume(shape: Shape, block: Any, refs: Any, plan: Plan, role: Any) -> None:
    """Computes the consumer's items."""
    spec, worker = shape.attention, _worker(shape, block, role)

    def item(i, tile):
        number = worker + i * shape.workers
        head, split, first, pages = plan.item(spec, number)
        turned = block.turned.at[role]
        cos_sin = (refs.cos, refs.sin) if spec.rotates else ()
        scales = () if spec.eps is None else (refs.q_scale, refs.k_scale)
        heads.turn(shape, refs.qkv, head * (spec.group + 2), cos_sin, scales, turned)
        q = attend.queries(shape, turned)
        is_last = split == plan.splits - 1
        pl.when(is_last)(lambda: _write(shape, refs, turned, head))

        def page(p, carry):
            tile, state = carry
            start = (first + p) * spec.page_size
            state = _page(shape, block, role, plan, q, turned, tile, start, state)
            return tile + 2, state

        tile, state = lax.fori_loop(0, pages, page, (tile, attend.no_state(shape)))
        attend.store(shape, refs, number, state)
        exchange.signal(shape, refs.counters, shape.waits + head)
        plgpu.wait_smem_to_gmem(0)
        return tile

    lax.fori_loop(0, plan.items(spec, shape.workers, worker), item, jnp.int32(0))
    _merge(shape, refs, plan, shape.workers - 1 - worker)


def _write(shape: Shape, refs: Any, turned: Any, head: Any) -> None:
    """Starts to store the new key and value in their pages."""
    page, slot = refs.page[0], refs.slot[0]
    plgpu.commit_smem()
    for i, pool in enumerate((refs.k_pages, refs.v_pages)):
        source = turned.at[pl.ds(ROWS * shape.attention.tiles + i, 1)]
        plgpu.copy_smem_to_gmem(source, pool.at[page, head, pl.ds(slot, 1)])


def _page(
    shape: Shape,
    block: Any,
    role: Any,
    plan: Plan,
    q: Any,
    turned: Any,
    tile: Any,
    start: Any,
    state: Any,
) -> Any:
    """The state behind the keys of a page, which begins at the position ``start``."""
    spec, own = shape.attention, plan.new - start
    k, v = (ring.receive(shape, block, None, role, tile + i) for i in range(2))
    # The new key and value are on their way to the page.
    is_here = (own >= 0) & (own < spec.page_size)
    pl.when(is_here)(lambda: heads.insert(shape, turned, k, v, own))
    low = jnp.clip(plan.first_key - start, 0, spec.page_size)
    high = jnp.clip(own + 1, 0, spec.page_size)

    def work(s, state):
        some, first = pl.ds(s * KEYS, KEYS), s * KEYS
        ends = jnp.maximum(low - first, 0), jnp.minimum(high - first, KEYS)
        return attend.attend(shape, k.at[some], v.at[some], q, state, *ends)

    end = jnp.where(high > low, lax.div(high + KEYS - 1, KEYS), 0)
    state = lax.fori_loop(lax.div(low, KEYS), end, work, state)
    for i in range(2):
        ring.release(shape, block, None, role, tile + i)
    return state


def _merge(shape: Shape, refs: Any, plan: Plan, worker: Any) -> None:
    """Merges the results of the worker's query heads; it is counted from the other end than for
    items, so that it may have had none."""
    spec = shape.attention

    def one(i, carry):
        query = worker + i * shape.workers
        which = shape.waits + lax.div(query, spec.group)
        exchange.wait(shape, refs.counters, which, plan.splits)
        heads.merge(shape, refs, query, plan.splits)
        exchange.signal(shape, refs.counters, 0)

    count = lax.div(spec.heads - worker + shape.workers - 1, shape.workers)
    lax.fori_loop(0, count, one, None)
