"""The rings of shared memory through which a block's producer hands tiles to its consumers.

Each consumer has a ring of slots. A tile, counted from the kernel's begin, goes into the next slot;
its barrier says when it is full, another one when it is free again. Tiles that are held until the
last product have slots of their own behind the ring's, and negative numbers: -1 is the first one.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, PACE, Product, Shape


def fetch(
    shape: Shape, block: Any, product: Product | None, consumer: Any, tile: Any, source: Any
) -> None:
    """Lets the copy engine bring a consumer's next tile, as soon as its slot is free; ``product``
    is None for a page."""
    slot = _slot(shape, product, tile)
    at = _barrier(shape, consumer, slot)

    @pl.when(tile >= shape.slots)
    def _():
        plgpu.barrier_wait(block.free.at[at])

    plgpu.copy_gmem_to_smem(
        source, _place(shape, block, product, consumer, slot), block.full.at[at]
    )


def receive(shape: Shape, block: Any, product: Product | None, consumer: Any, tile: Any) -> Any:
    """Waits for a tile, and gives its memory."""
    slot = _slot(shape, product, tile)
    plgpu.barrier_wait(block.full.at[_barrier(shape, consumer, slot)])
    return _place(shape, block, product, consumer, slot)


def release(shape: Shape, block: Any, product: Product | None, consumer: Any, tile: Any) -> None:
    """Says that a tile is no longer needed."""
    slot = _slot(shape, product, tile)
    plgpu.barrier_arrive(block.free.at[_barrier(shape, consumer, slot)])


def drain(shape: Shape, block: Any, consumer: Any, tiles: Any) -> None:
    """Waits until the consumer has released all of its tiles."""
    for slot in range(shape.slots):

        @pl.when(tiles > slot)
        def _(slot: int = slot) -> None:
            plgpu.barrier_wait(block.free.at[_barrier(shape, consumer, slot)])


def _slot(shape: Shape, product: Product | None, tile: Any) -> Any:
    if not shape.held or product is not shape.products[-1]:
        return lax.rem(tile, shape.slots)
    return jnp.where(tile < 0, shape.slots - 1 - tile, lax.rem(tile, shape.slots))


def _barrier(shape: Shape, consumer: Any, slot: Any) -> Any:
    return consumer * (shape.slots + shape.held) + slot


def _place(shape: Shape, block: Any, product: Product | None, consumer: Any, slot: Any) -> Any:
    if shape.interpret:
        which = -1 if product is None else shape.products.index(product)
        return block.ring[which].at[consumer, slot]
    spec = shape.attention
    size = (spec.page_size, spec.size) if product is None else product.tile
    lines = math.prod(size) // LINE
    return block.ring.at[consumer, slot, pl.ds(0, lines)].reshape(size)


def pace(shape: Shape) -> None:
    """Waits a little, so that what attention reads and stores doesn't queue up behind weights that
    aren't urgent."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu()
    def pace(ctx):
        code = (
            "{ .reg .u32 start, now; .reg .pred more; mov.u32 start, %clock;"
            " again: mov.u32 now, %clock; sub.u32 now, now, start;"
            f" setp.lt.u32 more, now, {PACE}; @more bra again; }}"
        )
        words.statement([], code, "")

    pace()
