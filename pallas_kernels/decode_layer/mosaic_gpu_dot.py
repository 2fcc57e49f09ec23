"""The product of tiles and a vector, on the tensor cores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, ROWS, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, int32, ir, llvm

FRAGMENT = LINE  # sums of a warp's row: eight of each thread


def no_sums(shape: Shape) -> jax.Array:
    """Before the first tile of a unit: see ``dot``."""
    none = jnp.zeros((ROWS, FRAGMENT), jnp.float32)
    return none if shape.interpret else plgpu.layout_cast(none, words.by_tile(FRAGMENT, 8))


def dot(shape: Shape, tile: Any, inputs: Any, sums: jax.Array) -> jax.Array:
    """Adds a tile [ROWS, lines, LINE] times a vector to the sums [ROWS, FRAGMENT], of which
    ``total`` gives the rows'.

    The tensor cores' instruction multiplies 16 x 16 by 16 x 8 elements: the eight that a thread
    loads of its warp's row count as parts of two rows, and the vector's eight elements at the same
    place as parts of two columns; so what is wanted is the diagonal of the result. What stands
    beside it is added up too: to clear it would take as long as the products.
    """
    if shape.interpret:
        rows = tile[...].reshape(ROWS, -1).astype(jnp.float32)
        more = rows * inputs[...].astype(jnp.float32)
        return sums + more.reshape(ROWS, -1, FRAGMENT).sum(1)
    layout = words.by_tile(FRAGMENT, 8)

    @plgpu.inline_mgpu(
        arg_types=(words.REF, words.REF, layout),
        return_type=plgpu.ShapeDtypeStruct((ROWS, FRAGMENT), jnp.float32, layout=layout),
    )
    def dot(ctx, tile, inputs, sums):
        _, lines, _ = ir.MemRefType(tile.type).shape
        pointers = (
            words.row_pointer(tile, (words.warp_number(), 0, 0), 8, True),
            words.row_pointer(inputs, (0,), 8, True),
        )
        element = ir.MemRefType(tile.type).element_type
        four_words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        own = words.elements(sums.registers.flat[0])
        first, second = own[:4], own[4:]
        for line in range(lines):
            places = (mgpu.utils.getelementptr(p, [line * LINE], element) for p in pointers)
            w, x = (words.elements(llvm.load(four_words, place)) for place in places)
            first = words.mma(shape.dtype, w, (x[0], x[2]), first)
            second = words.mma(shape.dtype, w, (x[1], x[3]), second)
        return words.of_register(sums.layout, sums.shape, words.packed([*first, *second]))

    return dot(tile, inputs, sums)


def total(shape: Shape, sums: jax.Array) -> jax.Array:
    """What the sums of ``dot`` are in all, float32 [ROWS]."""
    if shape.interpret:
        return sums.sum(1)

    @plgpu.inline_mgpu(arg_types=(words.by_tile(FRAGMENT, 8),), return_type=words.ROW)
    def total(ctx, sums):
        lane = words.thread_number(32)
        row, column = arith.divui(lane, int32(4)), arith.remui(lane, int32(4))
        a, b, _, _, _, _, c, d = words.elements(sums.registers.flat[0])
        odd = arith.trunci(ir.IntegerType.get_signless(1), row)
        own = arith.select(odd, arith.addf(b, d), arith.addf(a, c))
        has = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(row, int32(2)), column)
        sum_: ir.Value = arith.select(has, own, mgpu.c(0.0, ir.F32Type.get()))
        sum_ = words.over_threads(arith.addf, sum_, (1, 2, 4, 8, 16))
        return words.of_register(words.BY_ROW.to_mgpu(), (ROWS,), words.packed([sum_]))

    return total(sums)
