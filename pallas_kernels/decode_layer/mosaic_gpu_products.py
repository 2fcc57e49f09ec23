"""The kernel's other phases: the products, and what is between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_attention as attention
from pallas_kernels.decode_layer import mosaic_gpu_choice as choice
from pallas_kernels.decode_layer import mosaic_gpu_dot as dot
from pallas_kernels.decode_layer import mosaic_gpu_exchange as exchange
from pallas_kernels.decode_layer import mosaic_gpu_ring as ring
from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, ROWS, Plan, Product, Shape


def tiles_before(shape: Shape, block: Any, plan: Plan) -> list[list[Any]]:
    """For each product and behind the last one, how many tiles came before for each consumer, but
    for those that are held."""
    consumers = range(shape.consumers)
    tiles = [[attention.tiles(shape, block, plan, consumer) for consumer in consumers]]
    for product in shape.products:
        held = shape.held if product is shape.products[-1] else 0
        counts = (
            product.chunks * product.share(block.index, shape.blocks, consumer, shape.consumers)
            for consumer in consumers
        )
        own = [jnp.maximum(count - held, 0) if held else count for count in counts]
        tiles.append([sum_ + count for sum_, count in zip(tiles[-1], own)])
    return tiles


def pick(index: Any, values: Sequence[Any]) -> Any:
    """``values[index]`` of an index that isn't known when the kernel is made."""
    picked = values[0]
    for number, value in enumerate(values[1:], 1):
        picked = jnp.where(index == number, value, picked)
    return picked


def produce(shape: Shape, block: Any, refs: Any, tiles: list[list[Any]]) -> None:
    """Fetches the block's tiles of all weights."""
    held, last = shape.held, len(shape.products) - 1
    for number, product in enumerate(shape.products):
        if product.chosen and not shape.products[number - 1].chosen:
            plgpu.barrier_wait(block.chosen)
        share = product.share(block.index, shape.blocks)
        stop = lax.div(share + shape.consumers - 1, shape.consumers) * product.chunks
        start = held if number == last else 0

        def in_turn(consumer: int, tile: Any, number: int = number, start: int = start) -> Any:
            return tiles[number][consumer] + tile - start

        _fetch(shape, block, product, refs.weights[number], start, stop, in_turn)
        if number == 0 and held:  # behind what is needed before
            product, weight = shape.products[-1], refs.weights[-1]
            _fetch(shape, block, product, weight, 0, held, lambda _, tile: -1 - tile)


def _fetch(
    shape: Shape,
    block: Any,
    product: Product,
    weight: Any,
    start: int,
    stop: Any,
    number_of: Callable,
) -> None:
    """Fetches the block's tiles of a weight [experts, parts, outputs, lines, LINE]: of each
    consumer's those from ``start`` to ``stop``, whose numbers in the rings are
    ``number_of(consumer, tile)``."""
    lines = product.chunk // LINE
    share = product.share(block.index, shape.blocks)

    def fetch(i, carry):
        turn, chunk = lax.div(i, product.chunks), lax.rem(i, product.chunks)
        if shape.held:
            pl.when(number_of(0, i) < shape.slots)(lambda: ring.pace(shape))
        # One tile for each consumer: none shall wait until another one's ring has room.
        for consumer in range(shape.consumers):
            nth = turn * shape.consumers + consumer

            @pl.when(nth < share)
            def _(consumer: int = consumer, nth: Any = nth) -> None:
                unit = product.first(block.index, shape.blocks) + nth * shape.blocks
                which, row, own = product.source(unit, chunk)
                expert = block.experts[0, which] if product.chosen else 0
                rows, columns = pl.ds(row, product.rows), pl.ds(own * lines, lines)
                source = weight.at[expert, :, rows, columns]
                ring.fetch(shape, block, product, consumer, number_of(consumer, i), source)

    lax.fori_loop(start, stop, fetch, None)


def multiply(shape: Shape, block: Any, refs: Any, role: Any, tiles: list[Any]) -> None:
    """The products, and what is between them; ``tiles`` are those of the consumer before each."""
    last = len(shape.products) - 1

    def bring(number: int, *vector: Any) -> None:
        """Waits for the signals of a number, and brings the vector that they are about."""
        counter = refs.counters, number, shape.workers if number else shape.attention.heads
        exchange.bring(shape, counter, block.vector.at[role], block.scratch.at[role], *vector)

    def choose() -> None:
        exchange.wait(shape, refs.counters, 2, shape.workers)
        choice.choose(shape, refs.logits, block.experts.at[role], block.shares.at[role])
        plgpu.barrier_arrive(block.chosen)

    def bring_stream() -> None:
        bring(last, refs.stream, refs.next_scale, shape.eps[1])
        plgpu.barrier_arrive(block.passed)

    def gate(unit, _, gate, up):
        return up * gate / (1 + jnp.exp(-gate))

    def weighed_gate(unit, _, *parts):
        which, _, _ = shape.products[2].source(unit, 0)
        return gate(unit, None, *parts) * block.shares[role, which]

    def only(unit, _, sum_):
        return sum_

    def add(unit, old, sum_):
        return old.astype(jnp.float32) + sum_

    def phase(which: int, ready: Callable, outs: Sequence, finish: Callable, old: Any = None):
        product = shape.products[which]
        _multiply(shape, block, role, product, tiles[which], ready, outs, finish, old)
        if which < last:
            exchange.signal(shape, refs.counters, which + 1)

    bring_h = functools.partial(bring, 1, refs.h, refs.scale, shape.eps[0])
    phase(0, lambda: bring(0, refs.attended), [refs.h], add, refs.x)
    if shape.top_k:
        phase(1, bring_h, [refs.logits], only)
        phase(2, choose, [refs.gated], weighed_gate)
    else:
        phase(1, bring_h, [refs.gated], gate)
    streams = [refs.stream, refs.new_x]
    phase(last - 1, lambda: bring(last - 1, refs.gated), streams, add, refs.h)
    phase(last, bring_stream, [refs.y], only)


def _multiply(
    shape: Shape,
    block: Any,
    role: Any,
    product: Product,
    before: Any,
    ready: Callable,
    outs: Sequence[Any],
    finish: Callable,
    old: Any,
) -> None:
    """Multiplies the consumer's units of a product, when ``ready`` has brought the inputs, and
    stores ``finish(unit, old, *sums)`` of each four rows, with what stands there in ``old``."""
    vector, parts, stack = block.vector.at[role], product.parts, product.stack
    held = shape.held if product is shape.products[-1] else 0
    count = product.share(block.index, shape.blocks, role, shape.consumers)

    def unit_of(i: Any) -> Any:
        nth = i * shape.consumers + role
        return product.first(block.index, shape.blocks) + nth * shape.blocks

    def rows_of(unit: Any) -> list[Any]:
        return [pl.ds(unit * product.rows + ROWS * n, ROWS) for n in range(stack)]

    def load(i: Any) -> list[jax.Array]:
        """What stands in ``old``, also of no unit."""
        if old is None:
            return []
        unit = jnp.minimum(unit_of(i), product.units - 1)
        return [exchange.rows_of(shape, old, own) for own in rows_of(unit)]

    def unit(i, olds):
        following, unit = load(i + 1), unit_of(i)  # loaded early, lest anything waits for them

        def add(chunk, sums):
            number = i * product.chunks + chunk
            after = before + number - held
            number = jnp.where(number < held, -1 - number, after) if held else after
            inputs = vector.at[pl.ds(chunk * product.chunk, product.chunk)]
            tile = ring.receive(shape, block, product, role, number)
            pieces = [
                tile.at[part, pl.ds(ROWS * n, ROWS)] for n in range(stack) for part in range(parts)
            ]
            sums = tuple(dot.dot(shape, own, inputs, sum_) for own, sum_ in zip(pieces, sums))
            ring.release(shape, block, product, role, number)
            return sums

        none = (dot.no_sums(shape),) * (parts * stack)
        sums = lax.fori_loop(0, product.chunks, add, none)
        totals = [dot.total(shape, sum_) for sum_ in sums]
        for n, own in enumerate(rows_of(unit)):
            done = finish(unit, olds[n] if olds else None, *totals[n * parts : (n + 1) * parts])
            for out in outs:
                exchange.put(shape, out, own, done)
        return following

    first = load(0)
    ready()
    lax.fori_loop(0, count, unit, first)
