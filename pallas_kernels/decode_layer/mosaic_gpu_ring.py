"""The rings of shared memory through which a block's producer hands tiles to its consumers.

Each consumer has a ring of slots. A tile, counted from the kernel's begin, goes into the next slot;
its barrier says when it is full, another one when it is free again.
"""

from __future__ import annotations

import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, Product, Shape


def fetch(
    shape: Shape, block: Any, product: Product | None, consumer: Any, tile: Any, source: Any
) -> None:
    """Lets the copy engine bring a consumer's next tile, as soon as its slot is free; ``product``
    is None for a page."""
    at = _barrier(shape, consumer, tile)

    @pl.when(tile >= shape.slots)
    def _():
        plgpu.barrier_wait(block.free.at[at])

    plgpu.copy_gmem_to_smem(
        source, _place(shape, block, product, consumer, tile), block.full.at[at]
    )


def receive(shape: Shape, block: Any, product: Product | None, consumer: Any, tile: Any) -> Any:
    """Waits for a tile, and gives its memory."""
    plgpu.barrier_wait(block.full.at[_barrier(shape, consumer, tile)])
    return _place(shape, block, product, consumer, tile)


def release(shape: Shape, block: Any, consumer: Any, tile: Any) -> None:
    """Says that a tile is no longer needed."""
    plgpu.barrier_arrive(block.free.at[_barrier(shape, consumer, tile)])


def drain(shape: Shape, block: Any, consumer: Any, tiles: Any) -> None:
    """Waits until the consumer has released all of its tiles."""
    for slot in range(shape.slots):

        @pl.when(tiles > slot)
        def _(slot: int = slot) -> None:
            plgpu.barrier_wait(block.free.at[consumer * shape.slots + slot])


def _barrier(shape: Shape, consumer: Any, tile: Any) -> Any:
    return consumer * shape.slots + lax.rem(tile, shape.slots)


def _place(shape: Shape, block: Any, product: Product | None, consumer: Any, tile: Any) -> Any:
    slot = lax.rem(tile, shape.slots)
    if shape.interpret:
        which = -1 if product is None else shape.products.index(product)
        return block.ring[which].at[consumer, slot]
    spec = shape.attention
    size = (spec.page_size, spec.size) if product is None else product.tile
    lines = math.prod(size) // LINE
    return block.ring.at[consumer, slot, pl.ds(0, lines)].reshape(size)
