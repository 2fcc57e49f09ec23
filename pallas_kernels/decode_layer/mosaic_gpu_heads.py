"""Attention's parts in terms of Mosaic GPU's own arrays, each with its meaning in jnp for the
interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_layer import mosaic_gpu_exchange as exchange
from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_attend import LOWEST
from pallas_kernels.decode_layer.mosaic_gpu_shape import ROWS, Attention, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, int32, ir, llvm
from pallas_kernels.rope_kv_write.reference import rotate

MERGED_AT_ONCE = 10  # items' results whose loads are in flight together


def turn(
    shape: Shape, qkv: Any, first: Any, cos_sin: Sequence[Any], scales: Sequence[Any], turned: Any
) -> None:
    """Makes a KV head's queries and its new key, normalized and rotated, and its new value, from
    the rows of qkv [rows, size] that begin at ``first``. In ``turned`` the queries' tiles come
    first, whose last row is repeated until they are full, then key and value."""
    spec, dtype, eps = shape.attention, shape.dtype, shape.attention.eps or 0.0
    tiles, group, half = spec.tiles, spec.group, spec.size // 2
    if shape.interpret:
        x = qkv[pl.ds(first, group + 2)].astype(dtype)
        parts = [x[:group], x[group : group + 1]]
        if scales:
            parts = [rms_norm(p, s[...], eps) for p, s in zip(parts, scales)]
        if cos_sin:
            angles = tuple(ref[...][None] for ref in cos_sin)
            parts = [rotate(part[None], angles)[0] for part in parts]
        more = [parts[0][group - 1 :]] * (ROWS * tiles - group)
        turned[...] = jnp.concatenate([parts[0], *more, parts[1], x[group + 1 :]])
        return
    layout: Any = words.by_tile(half, half // 32).to_mgpu()
    row, load = layout.reduce((0,)), words.load_rows(layout, (ROWS, half))

    def whole(ref: Any, start: int) -> Any:
        """Half a row, the same for all warps."""
        own = words.load_row(ref, (start,), half, row)
        return own.broadcast_in_dim((ROWS, half), (1,), layout)

    def normalized(parts: list[Any], own: list[Any]) -> list[Any]:
        f32, to = ir.F32Type.get(), own[0].mlir_dtype
        squares = sum((x * x for x in parts[1:]), parts[0] * parts[0]).reduce("add", (1,))
        factor = (squares * mgpu.c(1 / spec.size, f32) + mgpu.c(eps, f32)).rsqrt(approx=True)
        factor = factor.broadcast_in_dim((ROWS, half), (0,), layout)
        return [
            ((x * factor).astype(to).astype(f32) * s.astype(f32)).astype(to).astype(f32)
            for x, s in zip(parts, own)
        ]

    def rotated(parts: list[Any], cos: Any, sin: Any) -> list[Any]:
        return [parts[0] * cos - parts[1] * sin, parts[1] * cos + parts[0] * sin]

    @plgpu.inline_mgpu(
        arg_types=(
            words.REF,
            words.REF,
            words.BY_ROW,
            (words.REF,) * len(cos_sin),
            (words.REF,) * len(scales),
        )
    )
    def turn(ctx, qkv, turned, first, cos_sin, scales):
        f32, narrow = ir.F32Type.get(), ir.MemRefType(turned.type).element_type
        first, warp = words.scalar_of(first), words.warp_number()
        places: list[Any] = [arith.addi(warp, int32(ROWS * t)) for t in range(tiles)]
        sources: list[Any] = [arith.minsi(place, int32(group - 1)) for place in places]
        places += [int32(ROWS * tiles + i) for i in range(2)]
        sources += [int32(group + i) for i in range(2)]
        # All loads come first, so that they are in flight together.
        heads = [
            [load(qkv, (arith.addi(first, source), start)) for start in (0, half)]
            for source in sources
        ]
        scales = [[whole(ref, start) for start in (0, half)] for ref in scales]
        cos_sin = [whole(ref, 0) for ref in cos_sin]
        for number, (parts, place) in enumerate(zip(heads, places)):
            parts = [part.astype(narrow).astype(f32) for part in parts]
            if scales and number <= tiles:
                parts = normalized(parts, scales[number // tiles])
            if cos_sin and number <= tiles:
                parts = rotated(parts, *cos_sin)
            for part, start in zip(parts, (0, half)):
                words.store_rows(part.astype(narrow), turned, (place, start))
        mgpu.warpgroup_barrier()

    turn(qkv, turned, *words.scalars(first), tuple(cos_sin), tuple(scales))


def insert(shape: Shape, turned: Any, k: Any, v: Any, row: Any) -> None:
    """Puts the new key and value, which ``turn`` has made, where they belong in their pages [keys,
    size]."""
    spec, first = shape.attention, ROWS * shape.attention.tiles
    if shape.interpret:
        for i, page in enumerate((k, v)):
            page[pl.ds(row, 1)] = turned[pl.ds(first + i, 1)]
        return

    @plgpu.inline_mgpu(arg_types=(words.REF, words.REF, words.REF, words.BY_ROW))
    def insert(ctx, turned, k, v, row):
        row, length = words.scalar_of(row), spec.size // 32
        kind = ir.VectorType.get((length,), ir.MemRefType(turned.type).element_type)
        for i, page in enumerate((k, v)):
            source = words.row_pointer(turned, (int32(first + i), 0), length, spread=True)
            own = llvm.load(kind, source)
            llvm.store(own, words.row_pointer(page, (row, 0), length, spread=True))
        mgpu.warpgroup_barrier()

    insert(turned, k, v, *words.scalars(row))


def merge(shape: Shape, refs: Any, query: Any, splits: Any) -> None:
    """Adds up the results of a query head's items, of which there are ``splits``, and stores what
    the head attended to. Each thread has columns of its own, and empties the sums that it has
    read."""
    spec = shape.attention
    head, row = lax.div(query, spec.group), lax.rem(query, spec.group)
    if shape.interpret:
        _merge_jnp(shape, refs, query, splits)
        return

    @plgpu.inline_mgpu(arg_types=((words.REF,) * 3, (words.BY_ROW,) * 4))
    def merge(ctx, arrays, scalars):
        marks, sums, attended = arrays
        query, head, row, splits = map(words.scalar_of, scalars)
        thread = words.thread_number(exchange.THREADS)
        columns: list[ir.Value] = [
            arith.addi(thread, int32(start)) for start in range(0, spec.size, exchange.THREADS)
        ]
        has = arith.cmpi(arith.CmpIPredicate.slt, thread, int32(spec.size))
        with mgpu.when(has):
            total, values = _summed(spec, marks, sums, columns, head, row, splits)
            narrow = mgpu.utils.dtype_to_ir_type(jnp.dtype(shape.dtype))
            for column, value in zip(columns, values):
                out = arith.truncf(narrow, arith.divf(value, total))
                place = arith.addi(arith.muli(query, int32(spec.size)), column)
                start = mgpu.utils.memref_ptr(attended)
                llvm.store(out, mgpu.utils.getelementptr(start, [place], narrow))

    arrays = refs.marks, refs.sums, refs.attended
    merge(arrays, words.scalars(query, head, row, splits))


def _summed(
    spec: Attention,
    marks: Any,
    sums: Any,
    columns: list[ir.Value],
    head: ir.Value,
    row: ir.Value,
    splits: ir.Value,
) -> tuple[ir.Value, list[ir.Value]]:
    """A query's sum of exponentials, and the sums of values in some columns."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    lowest, zero = mgpu.c(LOWEST, f32), mgpu.c(0.0, f32)
    steps = arith.ceildivui(splits, int32(MERGED_AT_ONCE))

    @mgpu.fori(steps, (lowest, zero, [zero for _ in columns]))
    def summed(step, carry: Any) -> Any:
        top, total, values = carry
        first, there, places = arith.muli(step, int32(MERGED_AT_ONCE)), [], []
        for i in range(MERGED_AT_ONCE):
            split = arith.addi(first, int32(i))
            there.append(arith.cmpi(arith.CmpIPredicate.slt, split, splits))
            split = arith.minsi(split, arith.subi(splits, int32(1)))
            number = arith.addi(arith.muli(split, int32(spec.kv_heads)), head)
            places.append((words.row_pointer(marks, (number, row, 0), 2, spread=False), 2))
            start = words.row_pointer(sums, (number, row, 0), 1, spread=False)
            places += [(mgpu.utils.getelementptr(start, [own], i32), 1) for own in columns]
        found = iter(exchange.load_filled(places, halves=False))
        for place, count in places:
            if count == 1:
                llvm.store(int32(-1), place)
        items = []
        for is_there in there:
            mark = [arith.bitcast(f32, word) for word in next(found)]
            parts = [arith.bitcast(f32, next(found)[0]) for _ in columns]
            items.append((arith.select(is_there, mark[0], lowest), mark[1], parts))
        new_top: Any = functools.reduce(arith.maxnumf, [highest for highest, _, _ in items], top)
        decay = words.exp2(arith.subf(top, new_top))
        total = arith.mulf(total, decay)
        values = [arith.mulf(value, decay) for value in values]
        for highest, exponentials, parts in items:
            weight = words.exp2(arith.subf(highest, new_top))
            total = arith.addf(total, arith.mulf(weight, exponentials))
            values = [arith.addf(x, arith.mulf(weight, y)) for x, y in zip(values, parts)]
        return new_top, total, values

    _, total, values = summed.results
    return total, values


def _merge_jnp(shape: Shape, refs: Any, query: Any, splits: Any) -> None:
    spec = shape.attention
    head, row = lax.div(query, spec.group), lax.rem(query, spec.group)

    def add(split, state):
        number = split * spec.kv_heads + head
        marks, values = (
            lax.bitcast_convert_type(ref[number, row], jnp.float32)
            for ref in (refs.marks, refs.sums)
        )
        top, total, sums = state
        new_top = jnp.maximum(top, marks[0])
        old, new = jnp.exp2(top - new_top), jnp.exp2(marks[0] - new_top)
        return new_top, total * old + marks[1] * new, sums * old + values * new

    none = jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(spec.size)
    _, total, sums = lax.fori_loop(0, splits, add, none)
    bits = lax.bitcast_convert_type((sums / total).astype(shape.dtype), refs.attended.dtype)
    refs.attended[pl.ds(query * spec.size, spec.size)] = bits
