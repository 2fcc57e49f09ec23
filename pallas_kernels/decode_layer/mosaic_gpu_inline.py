"""What Pallas has no words for: parts of the kernel in terms of Mosaic GPU's own arrays, each with
its meaning in jnp for the interpreter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, ROWS, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, ir, llvm, memref

FRAGMENT = 128  # sums of a warp's row: four of each thread


def no_sums(shape: Shape) -> jax.Array:
    """Before the first tile of a unit: see ``dot``."""
    return words.constant(shape, 0, FRAGMENT)


def dot(shape: Shape, tile: Any, inputs: Any, sums: jax.Array) -> jax.Array:
    """Adds a tile [ROWS, lines, LINE] times a vector to the sums [ROWS, FRAGMENT], of which
    ``total`` gives the rows'.

    On the tensor cores, whose instruction multiplies 16 x 16 by 16 x 8 elements: the eight that a
    thread loads of its warp's row count as parts of two rows, and the vector's eight elements at
    the same place as parts of two columns; so what is wanted is the diagonal of the result.
    """
    if shape.interpret:
        rows = tile[...].reshape(ROWS, -1).astype(jnp.float32)
        more = rows * inputs[...].astype(jnp.float32)
        return sums + more.reshape(ROWS, -1, FRAGMENT).sum(1)
    layout = words.by_tile(FRAGMENT, 4)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(shape.dtype).name]

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
        zero = mgpu.c(0.0, ir.F32Type.get())
        first, second = (words.elements(sums.registers.flat[0])[i : i + 2] for i in (0, 2))
        for line in range(lines):
            own = (mgpu.utils.getelementptr(p, [line * LINE], element) for p in pointers)
            w, x = (words.elements(llvm.load(four_words, pointer)) for pointer in own)
            first = words.mma(kind, w, (x[0], x[2]), [*first, zero, zero])[:2]
            second = words.mma(kind, w, (x[1], x[3]), [zero, zero, *second])[2:]
        return words.with_registers(sums, [words.packed([*first, *second])])

    return dot(tile, inputs, sums)


def total(shape: Shape, sums: jax.Array) -> jax.Array:
    """What the sums of ``dot`` are in all, float32 [ROWS]."""
    if shape.interpret:
        return sums.sum(1)

    @plgpu.inline_mgpu(arg_types=(words.by_tile(FRAGMENT, 4),), return_type=words.ROW)
    def total(ctx, sums):
        lane = arith.remui(mgpu.thread_idx(), words.int32(32))
        row, column = arith.divui(lane, words.int32(4)), arith.remui(lane, words.int32(4))
        a, b, c, d = words.elements(sums.registers.flat[0])
        odd = arith.trunci(ir.IntegerType.get_signless(1), row)
        own = arith.select(odd, arith.addf(b, d), arith.addf(a, c))
        has = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(row, words.int32(2)), column)
        zero = mgpu.c(0.0, ir.F32Type.get())
        register = words.packed([arith.select(has, own, zero), zero, zero, zero])
        return words.with_registers(sums, [register]).reduce("add", (1,))

    return total(sums)


def bring(
    shape: Shape, own: Any, scratch: Any, vector: Any, scale: Any = None, eps: float = 0.0
) -> None:
    """Copies a vector, which other blocks may have written, to the consumer's shared memory,
    normalized if there is a scale."""
    size = vector.shape[0]
    refs = (vector, own.at[pl.ds(0, size)], scratch)
    if shape.interpret:
        x = vector[...]
        refs[1][...] = x if scale is None else rms_norm(x, scale[...], eps)
        return
    load = functools.partial(
        mgpu.FragmentedArray.load_strided,
        vec_size=next(n for n in (8, 4, 2) if size % (128 * n) == 0),
    )

    @plgpu.inline_mgpu(arg_types=(words.REF,) * (3 if scale is None else 4))
    def bring(ctx, vector, own, scratch, scale=None):
        f32 = ir.F32Type.get()
        x = load(vector)
        if scale is not None:
            scale, h = load(scale), x.astype(f32)
            mean = (h * h).reduce("add", (0,), scratch) * mgpu.c(1 / size, f32)
            factor = (mean + mgpu.c(eps, f32)).rsqrt(approx=True)
            h = (h * factor.broadcast((size,))).astype(scale.mlir_dtype).astype(f32)
            x = (h * scale.astype(f32)).astype(x.mlir_dtype)
        x.store_untiled(own, optimized=False)
        mgpu.warpgroup_barrier()

    bring(*refs, *(() if scale is None else (scale,)))


def rows_of(shape: Shape, vector: Any, rows: Any) -> jax.Array:
    """The elements of a vector that stand where a tile's rows do, float32 [ROWS]."""
    if shape.interpret:
        return vector[rows].astype(jnp.float32)

    @plgpu.inline_mgpu(arg_types=(words.REF,), return_type=words.ROW)
    def load(ctx, vector):
        layout: Any = words.BY_ROW.to_mgpu()
        own = mgpu.FragmentedArray.load_untiled(vector, layout=layout, optimized=False)
        return own.astype(ir.F32Type.get())

    return load(vector.at[rows])


# --- choosing experts -----------------------------------------------------------------------------


def choose(shape: Shape, found: Any, logits: Any, experts: Any, shares: Any) -> None:
    """Brings the experts with the highest of the logits that were found, [experts], and their
    shares, to shared memory. Each thread has an expert, and counts those that are better."""
    count, top_k = found.shape[0], shape.top_k
    if shape.interpret:
        own = found[...]
        best, chosen = lax.top_k(own, top_k)
        weights = jnp.exp(best - best[0])
        everything = jnp.sum(jnp.exp(own - best[0]))
        experts[...] = chosen.astype(jnp.int32)
        total = jnp.sum(weights) if shape.normalize else everything
        shares[...] = weights / total * shape.scale
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,) * 4)
    def choose(ctx, found, logits, experts, shares):
        f32, index = ir.F32Type.get(), ir.IndexType.get()
        thread = arith.remui(mgpu.thread_idx(), words.int32(128))
        own = arith.index_cast(index, arith.minui(thread, words.int32(count - 1)))
        logit = memref.load(found, [own])
        exists = arith.cmpi(arith.CmpIPredicate.ult, thread, words.int32(count))
        memref.store(logit, logits, [own])
        mgpu.warpgroup_barrier()
        better, greatest = _count_better(logits, count, logit, thread)
        log2_e = mgpu.c(1.4426950408889634, f32)
        weight = _exp2(arith.mulf(arith.subf(logit, greatest), log2_e))
        mgpu.warpgroup_barrier()  # all have read the logits
        place = arith.index_cast(index, arith.minui(better, words.int32(top_k - 1)))
        chosen = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.ult, better, words.int32(top_k)))
        with mgpu.when(chosen):
            memref.store(thread, experts, [place])
            memref.store(weight, shares, [place])
        if not shape.normalize:
            memref.store(weight, logits, [own])
        mgpu.warpgroup_barrier()
        whole, size = (shares, top_k) if shape.normalize else (logits, count)
        total = _sum(whole, size)
        share = arith.mulf(arith.divf(weight, total), mgpu.c(shape.scale, f32))
        mgpu.warpgroup_barrier()  # all have read the weights
        with mgpu.when(chosen):
            memref.store(share, shares, [place])
        mgpu.warpgroup_barrier()

    choose(found, logits, experts, shares)


def _count_better(
    logits: ir.Value, count: int, own: ir.Value, number: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """How many of the logits are greater than a thread's own, or equal and before it, and the
    greatest one. A loop: code that runs once takes longer to be fetched than to run."""
    f32, i32, index = own.type, number.type, ir.IndexType.get()

    width = 16 if count % 16 == 0 else 4

    @mgpu.fori(mgpu.c(count // width, index), ((words.int32(0),) * 4, (own,) * 4))
    def counted(i, carry):
        better, greatest = map(list, carry)
        start = arith.muli(i, mgpu.c(width, index))
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(logits, (mgpu.ds(start, width),)))
        kind = ir.VectorType.get((4,), f32)
        for j in range(width):
            if j % 4 == 0:
                four = words.elements(llvm.load(kind, mgpu.utils.getelementptr(pointer, [j], f32)))
            other = four[j % 4]
            greatest[j % 4] = arith.maxnumf(greatest[j % 4], other)
            more = arith.cmpf(arith.CmpFPredicate.OGT, other, own)
            same = arith.cmpf(arith.CmpFPredicate.OEQ, other, own)
            place = arith.addi(arith.index_cast(i32, start), words.int32(j))
            first = arith.cmpi(arith.CmpIPredicate.ult, place, number)
            wins = arith.ori(more, arith.andi(same, first))
            better[j % 4] = arith.addi(better[j % 4], arith.extui(i32, wins))
        return tuple(better), tuple(greatest)

    better, greatest = counted.results
    return functools.reduce(arith.addi, better), functools.reduce(arith.maxnumf, greatest)


def _sum(values: ir.Value, count: int) -> ir.Value:
    """The sum of the first values of an array."""

    @mgpu.fori(mgpu.c(count, ir.IndexType.get()), mgpu.c(0.0, ir.F32Type.get()))
    def summed(i, total):
        return arith.addf(total, memref.load(values, [i]))

    return summed.result


# --- waiting for each other -----------------------------------------------------------------------


def signal(shape: Shape, counters: Any, which: int) -> None:
    """Counts one more; who waits for that sees all that the consumer has stored before."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,))
    def signal(ctx, counters):
        mgpu.warpgroup_barrier()
        _semaphore(counters, which).signal(1, memory_scope="gpu")

    signal(counters)


def wait(shape: Shape, counters: Any, which: int, count: int) -> None:
    """Waits until there were so many signals; then the consumer sees what was stored before."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,))
    def wait(ctx, counters):
        _semaphore(counters, which).wait(count, decrement=False, memory_scope="gpu")

    wait(counters)


def arrive(shape: Shape, counters: Any, head: Any, split: Any, splits: Any, before: Any) -> None:
    """Says that an item of a head is done, and stores in ``before`` how many of the head's were
    done before. The last one's count starts again from zero."""
    if shape.interpret:
        before[0] = split
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.REF, words.BY_ROW, words.BY_ROW))
    def arrive(ctx, counters, before, head, splits):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        place = words.to_index(arith.addi(words.scalar_of(head), words.int32(shape.waits + 1)))
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, (place,)))
        last = arith.subi(words.scalar_of(splits), words.int32(1))
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            code = "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;"
            count: Any = llvm.inline_asm(
                i32, [pointer, last], code, "=r,l,r", has_side_effects=True
            )
            memref.store(count, before, [mgpu.c(0, index)])
        mgpu.warpgroup_barrier()

    arrive(counters, before, *words.scalars(head, splits))


def clear(shape: Shape, counters: Any) -> None:
    """Sets the counters to zero if this is the last block that needs them; the one behind those of
    the signals, of the blocks that have come here, starts again by itself, as do the heads'."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,))
    def clear(ctx, counters):
        last = 4 * shape.waits
        code = (
            "{ .reg .u32 before; .reg .pred last;"
            f" atom.acq_rel.gpu.global.inc.u32 before, [$1+{last}], {shape.blocks - 1};"
            f" setp.eq.u32 last, before, {shape.blocks - 1};"
        )
        for offset in range(0, last, 4):
            code += f" @last st.relaxed.gpu.global.u32 [$1+{offset}], 0;"
        i32 = ir.IntegerType.get_signless(32)
        pointer = mgpu.utils.memref_ptr(counters)
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            code += " mov.u32 $0, before; }"
            llvm.inline_asm(i32, [pointer], code, "=r,l", has_side_effects=True)

    clear(counters)


def _semaphore(counters: Any, which: int) -> Any:
    return mgpu.SemaphoreRef(mgpu.utils.memref_ptr(mgpu.memref_slice(counters, which)))


def _exp2(x: ir.Value) -> Any:
    return llvm.inline_asm(x.type, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")
