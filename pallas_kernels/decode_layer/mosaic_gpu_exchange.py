"""What blocks tell each other: vectors in device memory, of which each block stores a part and then
each needs all.

Blocks count when they have stored their part, but none waits until it has arrived: while weights
stream, such a fence takes 1.5 to 4.5 µs. So a count may overtake what it stands for. It only says
that reading will soon be worth while: elements are empty until they are stored, which is a pattern
of bits that no arithmetic gives, and are read again while they are. The last block to need the
vectors empties them for the next kernel.

Each part has its meaning in jnp for the interpreter, where nobody waits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import ROWS, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, int32, ir, llvm, memref, scf

BITS: dict[int, Any] = {2: jnp.uint16, 4: jnp.uint32}
"""Vectors are stored as the bits of their elements, by an element's bytes."""
THREADS = 128  # of a warpgroup


def empty(size: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array that nothing was stored in. All bits are set: that is a NaN, but not the one that
    arithmetic gives."""
    bits = BITS[jnp.dtype(dtype).itemsize]
    return jnp.full(size, jnp.iinfo(bits).max, bits)


def put(shape: Shape, vector: Any, rows: Any, values: jax.Array) -> None:
    """Stores the float32 ``values`` [ROWS] of a tile's rows, each warp its own: in float32 if the
    elements have 32 bits, else in the kernel's dtype."""
    wide = jnp.dtype(vector.dtype).itemsize == 4
    dtype = jnp.float32 if wide else shape.dtype
    if shape.interpret:
        vector[rows] = lax.bitcast_convert_type(values.astype(dtype), vector.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.BY_ROW))
    def put(ctx, vector, values):
        value, size = words.scalar_of(values), 32 if wide else 16
        if not wide:
            value = arith.truncf(mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)), value)
        value = arith.bitcast(ir.IntegerType.get_signless(size), value)
        pointer = words.row_pointer(vector, (words.warp_number(),), 1, spread=False)
        code, kind = f"st.relaxed.gpu.global.b{size} [$0], $1;", "r" if wide else "h"
        words.statement([pointer, value], code, f"l,{kind}")

    put(vector.at[rows], values)


def bring(
    shape: Shape,
    counter: tuple[Any, int, int],
    own: Any,
    scratch: Any,
    vector: Any,
    scale: Any = None,
    eps: float = 0.0,
) -> None:
    """Waits for a vector, and copies it to the consumer's shared memory, normalized if there is a
    scale. ``counter`` is what ``wait`` needs."""
    size = vector.shape[0]
    refs = (vector, own.at[pl.ds(0, size)], scratch)
    if shape.interpret:
        x = lax.bitcast_convert_type(vector[...], shape.dtype)
        refs[1][...] = x if scale is None else rms_norm(x, scale[...], eps)
        return
    length = next(n for n in (8, 4, 2) if size % (THREADS * n) == 0)
    counters, which, count = counter

    @plgpu.inline_mgpu(arg_types=(words.REF,) * (4 if scale is None else 5))
    def bring(ctx, counter, vector, own, scratch, scale=None):
        f32 = ir.F32Type.get()
        if scale is not None:  # before anything is waited for
            scale = mgpu.FragmentedArray.load_strided(scale, vec_size=length)
        _wait(counter, int32(count))
        x = _load(vector, length, ir.MemRefType(own.type).element_type)
        if scale is not None:
            h = x.astype(f32)
            mean = (h * h).reduce("add", (0,), scratch) * mgpu.c(1 / size, f32)
            factor = (mean + mgpu.c(eps, f32)).rsqrt(approx=True)
            h = (h * factor.broadcast((size,))).astype(scale.mlir_dtype).astype(f32)
            x = (h * scale.astype(f32)).astype(x.mlir_dtype)
        x.store_untiled(own, optimized=False)
        mgpu.warpgroup_barrier()

    bring(counters.at[pl.ds(which, 1)], *refs, *(() if scale is None else (scale,)))


def _load(vector: ir.Value, length: int, element: ir.Type) -> Any:
    """A whole vector of 16-bit elements, ``length`` of them in a register array's vector."""
    size = ir.MemRefType(vector.type).shape[0]
    layout = mgpu.WGStridedFragLayout(shape=(size,), vec_size=length)
    start = mgpu.utils.memref_ptr(vector)
    pointers = [
        mgpu.utils.getelementptr(
            start, [arith.index_cast(ir.IntegerType.get_signless(64), place)], element
        )
        for place in layout.linear_thread_idxs()
    ]
    registers = np.empty(layout.registers_shape((size,)), dtype=object)
    kind = ir.VectorType.get((length,), element)
    places = [(pointer, length // 2) for pointer in pointers]
    for place, own in enumerate(load_filled(places, halves=True)):
        registers[place] = words.vector.bitcast(kind, words.packed(own))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def load_filled(places: Sequence[tuple[ir.Value, int]], halves: bool) -> list[list[ir.Value]]:
    """So many words of 32 bits from each place, as soon as none holds an empty element; an element
    has a word or half of one."""
    types = [ir.IntegerType.get_signless(32)] * sum(count for _, count in places)
    loop = scf.WhileOp(types, [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        found = [word for pointer, count in places for word in _load_words(pointer, count)]
        # Empty elements are the greatest ones.
        greatest = functools.reduce(_greater_halves if halves else arith.maxui, found)
        scf.condition(_is_empty(greatest, halves), found)
    with ir.InsertionPoint(loop.after.blocks.append(*types)):
        scf.yield_([])
    results = iter(loop.results)
    return [list(itertools.islice(results, count)) for _, count in places]


def _load_words(pointer: ir.Value, count: int) -> list[ir.Value]:
    results = ", ".join(f"${i}" for i in range(count))
    width = f".v{count}.b32" if count > 1 else ".b32"
    results = f"{{{results}}}" if count > 1 else results
    return words.several(
        count, [pointer], f"ld.relaxed.gpu.global{width} {results}, [${count}];", "l"
    )


def _greater_halves(a: ir.Value, b: ir.Value) -> ir.Value:
    result: Any = llvm.inline_asm(a.type, [a, b], "max.u16x2 $0, $1, $2;", "=r,r,r")
    return result


def _is_empty(word: ir.Value, halves: bool) -> ir.Value:
    """Whether a word is empty, or one of its halves."""
    equal = arith.CmpIPredicate.eq
    if not halves:
        return arith.cmpi(equal, word, int32(-1))
    low = arith.ori(word, int32(-(1 << 16)))
    high = arith.ori(word, int32((1 << 16) - 1))
    empty = (arith.cmpi(equal, half, int32(-1)) for half in (low, high))
    return arith.ori(*empty)


def rows_of(shape: Shape, vector: Any, rows: Any) -> jax.Array:
    """The elements of a vector that stand where a tile's rows do, [ROWS]; of one of those that are
    exchanged, after it was brought."""
    if shape.interpret:
        return lax.bitcast_convert_type(vector[rows], shape.dtype)
    one = plgpu.ShapeDtypeStruct((ROWS,), shape.dtype, layout=words.BY_ROW)

    @plgpu.inline_mgpu(arg_types=(words.REF,), return_type=one)
    def rows_of(ctx, vector):
        layout: Any = words.BY_ROW.to_mgpu()
        kind = ir.VectorType.get((1,), mgpu.utils.dtype_to_ir_type(jnp.dtype(shape.dtype)))
        pointer = words.row_pointer(vector, (words.warp_number(),), 1, spread=False)
        return words.of_register(layout, (ROWS,), llvm.load(kind, pointer))

    return rows_of(vector.at[rows])


def touch(shape: Shape, arrays: Sequence[Any]) -> None:
    """Reads the first and last words of arrays: the translation of their addresses, for which the
    first access waits two µs or so, is then known when the results are stored or read."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=((words.REF,) * len(arrays),))
    def touch(ctx, arrays):
        i32 = ir.IntegerType.get_signless(32)
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            for array in arrays:
                start = mgpu.utils.memref_ptr(array)
                for place in (0, _words(array) - 1):
                    _load_words(mgpu.utils.getelementptr(start, [place], i32), 1)

    touch(tuple(arrays))


# --- counting -------------------------------------------------------------------------------------


def signal(shape: Shape, counters: Any, which: Any) -> None:
    """Counts one more, when all of the consumer's warps are here."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,))
    def signal(ctx, counter):
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            code = "red.relaxed.gpu.global.add.u32 [$0], 1;"
            words.statement([mgpu.utils.memref_ptr(counter)], code, "l")

    signal(counters.at[pl.ds(which, 1)])


def wait(shape: Shape, counters: Any, which: Any, count: Any) -> None:
    """Waits until there were so many signals."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.BY_ROW))
    def wait(ctx, counter, count):
        _wait(counter, words.scalar_of(count))

    wait(counters.at[pl.ds(which, 1)], *words.scalars(count))


def _wait(counter: ir.Value, count: ir.Value) -> None:
    code = (
        "{ .reg .u32 seen; .reg .pred more; again: ld.relaxed.gpu.global.u32 seen, [$0];"
        " setp.lt.u32 more, seen, $1; @more bra again; }"
    )
    with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
        words.statement([mgpu.utils.memref_ptr(counter), count], code, "l,r")
    mgpu.warpgroup_barrier()


def restore(shape: Shape, counters: Any, vectors: Sequence[Any], before: Any) -> None:
    """Makes the counters zero and the vectors empty if this is the last block that needs them; the
    last counter, of the blocks that have come here, starts again by itself."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.REF, (words.REF,) * len(vectors)))
    def restore(ctx, counters, before, vectors):
        index = ir.IndexType.get()
        others = shape.counters - 1
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, others))
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            code = f"atom.relaxed.gpu.global.inc.u32 $0, [$1], {shape.blocks - 1};"
            [number] = words.several(1, [pointer], code, "l")
            memref.store(number, before, [mgpu.c(0, index)])
        mgpu.warpgroup_barrier()
        count = memref.load(before, [mgpu.c(0, index)])
        is_last = arith.cmpi(arith.CmpIPredicate.eq, count, int32(shape.blocks - 1))
        with mgpu.when(is_last):
            with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
                for which in range(others):
                    memref.store(int32(0), counters, [mgpu.c(which, index)])
            for vector in vectors:
                _empty(vector)

    restore(counters, before, tuple(vectors))


def _words(array: ir.Value) -> int:
    kind = ir.MemRefType(array.type)
    return math.prod(kind.shape) * mgpu.utils.bitwidth(kind.element_type) // 32


def _empty(vector: ir.Value) -> None:
    start, i32 = mgpu.utils.memref_ptr(vector), ir.IntegerType.get_signless(32)
    total = _words(vector)
    thread = words.thread_number(THREADS)

    @mgpu.fori(int32(-(-total // THREADS)), ())
    def _(i, carry):
        place = arith.addi(arith.muli(i, int32(THREADS)), thread)
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, place, int32(total))):
            llvm.store(int32(-1), mgpu.utils.getelementptr(start, [place], i32))
        return ()
