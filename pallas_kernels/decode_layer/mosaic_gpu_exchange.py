"""What blocks tell each other: vectors in device memory, of which each block stores a part and then
each needs all.

Blocks count when they have stored their part, but none waits until it has arrived: while weights
stream, such a fence takes 1.5 to 4.5 µs. So a count may overtake what it stands for. It only says
that reading will soon be worth while; an element that is still ``EMPTY``, which is no result of any
arithmetic, is read again. The last block to need the vectors empties them for the next kernel.

Each part has its meaning in jnp for the interpreter, where nobody waits.
"""

from __future__ import annotations

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
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, int32, ir, llvm, memref

BITS: dict[int, Any] = {2: jnp.uint16, 4: jnp.uint32}
"""Vectors are stored as the bits of their elements, by an element's bytes."""
THREADS = 128  # of a warpgroup


def empty(size: int, dtype: Any) -> jax.Array:
    """A vector that nothing was stored in. All bits are set: that is a NaN, but not the one that
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
    shape: Shape, own: Any, scratch: Any, vector: Any, scale: Any = None, eps: float = 0.0
) -> None:
    """Copies a vector, when all of it is there, to the consumer's shared memory, normalized if
    there is a scale."""
    size = vector.shape[0]
    refs = (vector, own.at[pl.ds(0, size)], scratch)
    if shape.interpret:
        x = lax.bitcast_convert_type(vector[...], shape.dtype)
        refs[1][...] = x if scale is None else rms_norm(x, scale[...], eps)
        return
    length = next(n for n in (8, 4, 2) if size % (THREADS * n) == 0)

    @plgpu.inline_mgpu(arg_types=(words.REF,) * (3 if scale is None else 4))
    def bring(ctx, vector, own, scratch, scale=None):
        f32 = ir.F32Type.get()
        x = _load(vector, length, ir.MemRefType(own.type).element_type)
        if scale is not None:
            scale = mgpu.FragmentedArray.load_strided(scale, vec_size=length)
            h = x.astype(f32)
            mean = (h * h).reduce("add", (0,), scratch) * mgpu.c(1 / size, f32)
            factor = (mean + mgpu.c(eps, f32)).rsqrt(approx=True)
            h = (h * factor.broadcast((size,))).astype(scale.mlir_dtype).astype(f32)
            x = (h * scale.astype(f32)).astype(x.mlir_dtype)
        x.store_untiled(own, optimized=False)
        mgpu.warpgroup_barrier()

    bring(*refs, *(() if scale is None else (scale,)))


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
    for place, own in enumerate(load_filled(pointers, length // 2, halves=True)):
        registers[place] = words.vector.bitcast(kind, words.packed(own))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def load_filled(pointers: Sequence[ir.Value], count: int, halves: bool) -> list[list[ir.Value]]:
    """``count`` words of 32 bits from each place, as soon as they hold no empty element; an element
    has a word or half of one."""
    found = [_load_words(pointer, count) for pointer in pointers]
    # Not before all are under way.
    return [_filled(pointer, own, halves) for pointer, own in zip(pointers, found)]


def _load_words(pointer: ir.Value, count: int) -> list[ir.Value]:
    results = ", ".join(f"${i}" for i in range(count))
    code = f"ld.relaxed.gpu.global{_width(count)} {{{results}}}, [${count}];"
    return words.several(count, [pointer], code, "l")


def _filled(pointer: ir.Value, found: list[ir.Value], halves: bool) -> list[ir.Value]:
    count = len(found)
    results = ", ".join(f"${i}" for i in range(count))
    # No half of a word w is empty if (~w - 0x00010001) & w & 0x80008000 is zero (the test for a
    # zero byte in Warren, Hacker's Delight, section 6-1).
    one = (
        "not.b32 one, {w}; sub.u32 one, one, 0x10001; and.b32 one, one, {w}; or.b32 any, any, one;"
    )
    test = "and.b32 any, any, 0x80008000; setp.ne.u32 empty, any, 0;"
    if not halves:
        one = "setp.eq.u32 empty, {w}, -1; selp.u32 one, 1, 0, empty; or.b32 any, any, one;"
        test = "setp.ne.u32 empty, any, 0;"
    tests = " ".join(one.format(w=f"${i}") for i in range(count))
    code = (
        "{ .reg .b32 any, one; .reg .pred empty; check: mov.b32 any, 0;"
        f" {tests} {test} @!empty bra done;"
        f" ld.relaxed.gpu.global{_width(count)} {{{results}}}, [${count}]; bra check; done: }}"
    )
    ties = ",".join(str(i) for i in range(count))
    return words.several(count, [pointer, *found], code, f"l,{ties}")


def _width(count: int) -> str:
    return f".v{count}.b32" if count > 1 else ".b32"


def rows_of(shape: Shape, vector: Any, rows: Any) -> jax.Array:
    """The elements of a vector that stand where a tile's rows do, [ROWS]; of one of those that are
    exchanged, after it was brought."""
    if shape.interpret:
        return lax.bitcast_convert_type(vector[rows], shape.dtype)
    one = plgpu.ShapeDtypeStruct((ROWS,), shape.dtype, layout=words.BY_ROW)

    @plgpu.inline_mgpu(arg_types=(words.REF,), return_type=one)
    def rows_of(ctx, vector):
        layout: Any = words.BY_ROW.to_mgpu()
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(shape.dtype))
        pointer = words.row_pointer(vector, (words.warp_number(),), 1, spread=False)
        registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
        registers.flat[0] = llvm.load(ir.VectorType.get((1,), element), pointer)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return rows_of(vector.at[rows])


# --- counting -------------------------------------------------------------------------------------


def signal(shape: Shape, counters: Any, which: int) -> None:
    """Counts one more, when all of the consumer's warps are here."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,))
    def signal(ctx, counters):
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, which))
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            words.statement([pointer], "red.relaxed.gpu.global.add.u32 [$0], 1;", "l")

    signal(counters)


def wait(shape: Shape, counters: Any, which: int, count: int) -> None:
    """Waits until there were so many signals."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,))
    def wait(ctx, counters):
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, which))
        code = (
            "{ .reg .u32 seen; .reg .pred more; again: ld.relaxed.gpu.global.u32 seen, [$0];"
            f" setp.lt.u32 more, seen, {count}; @more bra again; }}"
        )
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            words.statement([pointer], code, "l")
        mgpu.warpgroup_barrier()

    wait(counters)


def arrive(shape: Shape, counters: Any, head: Any, split: Any, splits: Any, before: Any) -> None:
    """Says that an item of a head is done, and stores in ``before`` how many of the head's were
    done before; the last one sees what all have stored. Its count starts again from zero."""
    if shape.interpret:
        before[0] = split
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.REF, words.BY_ROW, words.BY_ROW))
    def arrive(ctx, counters, before, head, splits):
        place = words.to_index(arith.addi(words.scalar_of(head), int32(shape.waits + 1)))
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, (place,)))
        _count_in_turn(pointer, arith.subi(words.scalar_of(splits), int32(1)), before)

    arrive(counters, before, *words.scalars(head, splits))


def restore(shape: Shape, counters: Any, vectors: Sequence[Any], before: Any) -> None:
    """Makes the counters zero and the vectors empty if this is the last block that needs them; the
    counter behind those of the signals, of the blocks that have come here, starts again by itself,
    as do the heads'."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.REF, (words.REF,) * len(vectors)))
    def restore(ctx, counters, before, vectors):
        index = ir.IndexType.get()
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, shape.waits))
        _count_in_turn(pointer, int32(shape.blocks - 1), before)
        count = memref.load(before, [mgpu.c(0, index)])
        is_last = arith.cmpi(arith.CmpIPredicate.eq, count, int32(shape.blocks - 1))
        with mgpu.when(is_last):
            with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
                for which in range(shape.waits):
                    memref.store(int32(0), counters, [mgpu.c(which, index)])
            for vector in vectors:
                _empty(vector)

    restore(counters, before, tuple(vectors))


def _empty(vector: ir.Value) -> None:
    kind = ir.MemRefType(vector.type)
    start, i32 = mgpu.utils.memref_ptr(vector), ir.IntegerType.get_signless(32)
    total = kind.shape[0] * mgpu.utils.bitwidth(kind.element_type) // 32
    thread = arith.remui(mgpu.thread_idx(), int32(THREADS))

    @mgpu.fori(int32(-(-total // THREADS)), ())
    def _(i, carry):
        place = arith.addi(arith.muli(i, int32(THREADS)), thread)
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, place, int32(total))):
            llvm.store(int32(-1), mgpu.utils.getelementptr(start, [place], i32))
        return ()


def _count_in_turn(pointer: ir.Value, last: ir.Value, before: ir.Value) -> None:
    """Counts one more, when all of the warpgroup's warps are here and what they have stored has
    arrived, and brings the count before to shared memory; behind ``last`` comes zero."""
    mgpu.warpgroup_barrier()
    with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
        code = "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;"
        i32 = ir.IntegerType.get_signless(32)
        count: Any = llvm.inline_asm(i32, [pointer, last], code, "=r,l,r", has_side_effects=True)
        memref.store(count, before, [mgpu.c(0, ir.IndexType.get())])
    mgpu.warpgroup_barrier()
