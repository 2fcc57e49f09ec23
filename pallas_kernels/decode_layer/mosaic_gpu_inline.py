"""What Pallas has no words for: parts of the kernel in terms of Mosaic GPU's own arrays, each with
its meaning in jnp for the interpreter.

These parts take scalars as vectors of one element for each row of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, ROWS, Shape

# The dialects that Mosaic GPU is written in.
arith, ir, llvm = mgpu.utils.arith, mgpu.utils.ir, mgpu.utils.llvm
memref, vector = mgpu.utils.memref, mgpu.utils.vector

REF = plgpu.RefType()
LOWEST = -1e30  # of a score: less than any, but no infinity, whose differences are no numbers
FRAGMENT = 128  # sums of a warp's row: four of each thread
MERGED_AT_ONCE = 12  # items' results whose loads are in flight together


def by_tile(width: int, vector: int) -> Any:
    """The registers' layout of a tile whose rows consist of lines of that width: a warp has a row,
    a thread ``vector`` elements of each line."""
    tiling = Tiling(((ROWS, width), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


BY_ROW = by_tile(LINE, LINE // 32).reduce((1,))
"""Of a vector with one element for each row of a tile."""


def by_head(size: int) -> Any:
    """Of a tile of queries, or of what belongs to them."""
    return by_tile(size, size // 32)


def scalars(*values: Any) -> tuple[jax.Array, ...]:
    """int32 scalars as vectors [ROWS]."""
    return tuple(plgpu.layout_cast(jnp.full((ROWS,), value, jnp.int32), BY_ROW) for value in values)


def constant(shape: Shape, value: float, size: int = 0) -> jax.Array:
    """A float32 vector [ROWS], or a tile [ROWS, size], that holds one value."""
    extent = (ROWS, size) if size else (ROWS,)
    array = jnp.full(extent, value, jnp.float32)
    return array if shape.interpret else plgpu.layout_cast(array, by_head(size) if size else BY_ROW)


# --- products -------------------------------------------------------------------------------------


def no_sums(shape: Shape) -> jax.Array:
    """Before the first tile of a unit: see ``dot``."""
    return constant(shape, 0, FRAGMENT)


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
    layout = by_tile(FRAGMENT, 4)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(shape.dtype).name]

    @plgpu.inline_mgpu(
        arg_types=(REF, REF, layout),
        return_type=plgpu.ShapeDtypeStruct((ROWS, FRAGMENT), jnp.float32, layout=layout),
    )
    def dot(ctx, tile, inputs, sums):
        _, lines, _ = ir.MemRefType(tile.type).shape
        pointers = _pointer(tile, (_warp(), 0, 0), 8, True), _pointer(inputs, (0,), 8, True)
        element = ir.MemRefType(tile.type).element_type
        words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        zero = mgpu.c(0.0, ir.F32Type.get())
        first, second = (_elements(sums.registers.flat[0])[i : i + 2] for i in (0, 2))
        for line in range(lines):
            own = (mgpu.utils.getelementptr(p, [line * LINE], element) for p in pointers)
            w, x = (_elements(llvm.load(words, pointer)) for pointer in own)
            first = _mma(kind, w, (x[0], x[2]), [*first, zero, zero])[:2]
            second = _mma(kind, w, (x[1], x[3]), [zero, zero, *second])[2:]
        return _with_registers(sums, [_packed([*first, *second])])

    return dot(tile, inputs, sums)


def total(shape: Shape, sums: jax.Array) -> jax.Array:
    """What the sums of ``dot`` are in all, float32 [ROWS]."""
    if shape.interpret:
        return sums.sum(1)

    @plgpu.inline_mgpu(arg_types=(by_tile(FRAGMENT, 4),), return_type=_vector(jnp.float32))
    def total(ctx, sums):
        lane = arith.remui(mgpu.thread_idx(), _i32(32))
        row, column = arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))
        a, b, c, d = _elements(sums.registers.flat[0])
        odd = arith.trunci(ir.IntegerType.get_signless(1), row)
        own = arith.select(odd, arith.addf(b, d), arith.addf(a, c))
        has = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(row, _i32(2)), column)
        zero = mgpu.c(0.0, ir.F32Type.get())
        register = _packed([arith.select(has, own, zero), zero, zero, zero])
        return _with_registers(sums, [register]).reduce("add", (1,))

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
        refs[1][...] = x if scale is None else _normalized(x, scale[...], eps)
        return
    load = functools.partial(
        mgpu.FragmentedArray.load_strided,
        vec_size=next(n for n in (8, 4, 2) if size % (128 * n) == 0),
    )

    @plgpu.inline_mgpu(arg_types=(REF,) * (3 if scale is None else 4))
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

    @plgpu.inline_mgpu(arg_types=(REF,), return_type=_vector(jnp.float32))
    def load(ctx, vector):
        layout: Any = BY_ROW.to_mgpu()
        own = mgpu.FragmentedArray.load_untiled(vector, layout=layout, optimized=False)
        return own.astype(ir.F32Type.get())

    return load(vector.at[rows])


# --- attention ------------------------------------------------------------------------------------


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
            parts = [_normalized(p, s[...], eps) for p, s in zip(parts, scales)]
        if cos_sin:
            parts = [_rotated(part, *(ref[...] for ref in cos_sin)) for part in parts]
        more = [parts[0][group - 1 :]] * (ROWS * tiles - group)
        turned[...] = jnp.concatenate([parts[0], *more, parts[1], x[group + 1 :]])
        return
    layout: Any = by_tile(half, half // 32).to_mgpu()
    row, load = layout.reduce((0,)), _load_own(layout, (ROWS, half))

    def whole(ref: Any, start: int) -> Any:
        """Half a row, the same for all warps."""
        own = _load(ref, (start,), half, row)
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

    @plgpu.inline_mgpu(arg_types=(REF, REF, BY_ROW, (REF,) * len(cos_sin), (REF,) * len(scales)))
    def turn(ctx, qkv, turned, first, cos_sin, scales):
        f32, narrow = ir.F32Type.get(), ir.MemRefType(turned.type).element_type
        first, warp = _scalar(first), _warp()
        places: list[Any] = [arith.addi(warp, _i32(ROWS * t)) for t in range(tiles)]
        sources: list[Any] = [arith.minsi(place, _i32(group - 1)) for place in places]
        places += [_i32(ROWS * tiles + i) for i in range(2)]
        sources += [_i32(group + i) for i in range(2)]
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
                _store_own(part.astype(narrow), turned, (place, start))
        mgpu.warpgroup_barrier()

    turn(qkv, turned, *scalars(first), tuple(cos_sin), tuple(scales))


def queries(shape: Shape, turned: Any) -> tuple[jax.Array, ...]:
    """The tiles of queries, scaled, float32 [ROWS, size] each."""
    spec = shape.attention
    layout = by_head(spec.size)
    if shape.interpret:
        tiles = [turned[pl.ds(ROWS * t, ROWS)].astype(jnp.float32) for t in range(spec.tiles)]
        return tuple(tile * spec.scale for tile in tiles)
    tile = plgpu.ShapeDtypeStruct((ROWS, spec.size), jnp.float32, layout=layout)
    load = _load_own(layout.to_mgpu(), (ROWS, spec.size))

    @plgpu.inline_mgpu(arg_types=(REF,), return_type=(tile,) * spec.tiles)
    def queries(ctx, turned):
        f32 = ir.F32Type.get()
        rows = (arith.addi(_warp(), _i32(ROWS * t)) for t in range(spec.tiles))
        return tuple(load(turned, (row, 0)).astype(f32) * mgpu.c(spec.scale, f32) for row in rows)

    return queries(turned)


State = tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
"""Of each tile of queries: the highest score so far [ROWS], the sum of the exponentials of scores
less that [ROWS], and the sum of the values that they weigh [ROWS, size]."""


def no_state(shape: Shape) -> State:
    """Before the first key."""
    spec = shape.attention
    one = constant(shape, LOWEST), constant(shape, 0), constant(shape, 0, spec.size)
    return (one,) * spec.tiles


def attend(
    shape: Shape, k: Any, v: Any, q: tuple[jax.Array, ...], state: State, low: Any, high: Any
) -> State:
    """The state behind the keys k [keys, size] and values v, of which those from ``low`` on and
    before ``high`` count; there is one, and the others aren't read."""
    spec, keys = shape.attention, k.shape[0]
    if shape.interpret:
        number = jnp.arange(keys)
        seen = (low <= number) & (number < high)
        key = jnp.where(seen[:, None], k[...], 0).astype(jnp.float32)
        value = jnp.where(seen[:, None], v[...], 0).astype(jnp.float32)
        scores = [jnp.where(seen, tile @ key.T, LOWEST) for tile in q]
        parts = [(s.max(1), s) for s in scores]
        return tuple(
            _joined_jnp(one, top, jnp.where(seen, jnp.exp2(s - top[:, None]), 0), value)
            for one, (top, s) in zip(state, parts)
        )
    layout: Any = by_head(spec.size).to_mgpu()

    def row(ref: Any, index: Any) -> Any:
        own = _load(ref, (index, 0), spec.size, layout.reduce((0,))).astype(ir.F32Type.get())
        return own.broadcast_in_dim((ROWS, spec.size), (1,), layout)

    def step(ctx, k, v, q, state, low, high):
        low, high = _scalar(low), _scalar(high)
        last = arith.subi(high, _i32(1))
        # What doesn't count is replaced by what does, since it may be no number.
        index = [arith.maxsi(arith.minsi(_i32(i), last), low) for i in range(keys)]
        seen = [arith.cmpi(arith.CmpIPredicate.eq, at, _i32(i)) for i, at in enumerate(index)]
        rows = [row(k, at) for at in index]
        scores = [[(q * key).reduce("add", (1,)) for key in rows] for q in q]
        rows = [row(v, at) for at in index]
        return tuple(_joined(one, own, seen, rows, layout) for one, own in zip(state, scores))

    return _with_state(shape, step, (REF, REF, (by_head(spec.size),) * spec.tiles), 2)(
        k, v, q, state, *scalars(low, high)
    )


def _joined(state: Any, scores: list[Any], seen: list[Any], values: list[Any], layout: Any) -> Any:
    """A tile's state behind some more keys."""
    top, total, sums = state
    scores = [_where(one, score, LOWEST) for one, score in zip(seen, scores)]
    new_top = functools.reduce(lambda a, b: a.max(b), scores, top)
    weights = [
        _where(one, (score - new_top).exp2(approx=True), 0.0) for one, score in zip(seen, scores)
    ]
    return _weighed(top, new_top, total, sums, weights, [None] * len(weights), values, layout)


def _weighed(top, new_top, total, sums, weights, totals, values, layout) -> Any:
    """The state with a higher top and more values, each with its weight, which counts ``totals``
    times (None: once)."""
    decay = (top - new_top).exp2(approx=True)
    total = total * decay
    sums = sums * decay.broadcast_in_dim(sums.shape, (0,), layout)
    for weight, count, value in zip(weights, totals, values):
        total = total + (weight if count is None else weight * count)
        sums = sums + weight.broadcast_in_dim(sums.shape, (0,), layout) * value
    return new_top, total, sums


def _joined_jnp(state: Any, top: Any, weights: Any, values: Any) -> Any:
    """A tile's state behind more keys: their highest score, and weights relative to that."""
    old_top, total, sums = state
    new_top = jnp.maximum(old_top, top)
    old, new = jnp.exp2(old_top - new_top), jnp.exp2(top - new_top)
    total = total * old + weights.sum(1) * new
    return new_top, total, sums * old[:, None] + (weights * new[:, None]) @ values


def merge(
    shape: Shape, parts: Sequence[Any], state: State, head: Any, first: Any, splits: Any
) -> State:
    """The state with the results of ``MERGED_AT_ONCE`` items of a head, from the ``first`` on, of
    which there are ``splits`` in all. ``parts`` are the items' tops, totals and sums."""
    spec = shape.attention
    if shape.interpret:
        for i in range(MERGED_AT_ONCE):
            split = jnp.minimum(first + i, splits - 1)
            there = first + i < splits
            number = split * spec.kv_heads + head

            def own(ref: Any, t: int, number: Any = number) -> jax.Array:
                return ref[number, pl.ds(ROWS * t, ROWS)]

            state = tuple(
                _merged_jnp(one, [own(ref, t) for ref in parts], there)
                for t, one in enumerate(state)
            )
        return state
    layout: Any = by_head(spec.size).to_mgpu()
    narrow, load = layout.reduce((1,)), _load_own(layout, (ROWS, spec.size))

    def step(ctx, tops, totals, sums, state, head, first, splits):
        head, first, splits, warp = *map(_scalar, (head, first, splits)), _warp()
        numbers, there = [], []
        for i in range(MERGED_AT_ONCE):
            split = arith.addi(first, _i32(i))
            there.append(arith.cmpi(arith.CmpIPredicate.slt, split, splits))
            split = arith.minsi(split, arith.subi(splits, _i32(1)))
            numbers.append(arith.addi(arith.muli(split, _i32(spec.kv_heads)), head))

        def column(ref: Any, number: Any, row: Any) -> Any:
            return _load(ref, (number, row), 1, narrow, (ROWS,))

        merged = []
        for t, one in enumerate(state):
            row = arith.addi(warp, _i32(ROWS * t))
            own = [
                _where(is_there, column(tops, number, row), LOWEST)
                for number, is_there in zip(numbers, there)
            ]
            counts = [column(totals, number, row) for number in numbers]
            values = [load(sums, (number, row, 0)) for number in numbers]
            new_top = functools.reduce(lambda a, b: a.max(b), own, one[0])
            weights = [
                _where(is_there, (top - new_top).exp2(approx=True), 0.0)
                for top, is_there in zip(own, there)
            ]
            _, before, summed = one
            merged.append(
                _weighed(one[0], new_top, before, summed, weights, counts, values, layout)
            )
        return tuple(merged)

    return _with_state(shape, step, (REF, REF, REF), 3)(
        *parts, state, *scalars(head, first, splits)
    )


def _merged_jnp(state: Any, result: list[Any], there: Any) -> Any:
    """The state with an item's result, if there is one."""
    top, total, sums = result
    old_top, old_total, old_sums = state
    new_top = jnp.maximum(old_top, jnp.where(there, top, LOWEST))
    old, new = jnp.exp2(old_top - new_top), jnp.where(there, jnp.exp2(top - new_top), 0)
    return (
        new_top,
        old_total * old + total * new,
        old_sums * old[:, None] + jnp.where(there, sums, 0) * new[:, None],
    )


def _with_state(shape: Shape, step: Callable, before: tuple, count: int) -> Callable:
    """``step``, whose arguments are of the types ``before``, then a state, then ``count`` scalars,
    and which gives a state."""
    spec = shape.attention
    layouts = (BY_ROW, BY_ROW, by_head(spec.size))
    sizes = ((ROWS,), (ROWS,), (ROWS, spec.size))
    one = tuple(
        plgpu.ShapeDtypeStruct(size, jnp.float32, layout=layout)
        for size, layout in zip(sizes, layouts)
    )
    types = (*before, (layouts,) * spec.tiles, *(BY_ROW,) * count)
    return plgpu.inline_mgpu(arg_types=types, return_type=(one,) * spec.tiles)(step)


def store_heads(shape: Shape, attended: Any, state: State, head: Any) -> None:
    """Stores a head's result in the vector of all heads' queries."""
    spec = shape.attention
    group, size = spec.group, spec.size
    if shape.interpret:
        rows = jnp.concatenate([sums / total[:, None] for _, total, sums in state])[:group]
        attended[pl.ds(head * group * size, group * size)] = rows.reshape(-1).astype(shape.dtype)
        return
    layout: Any = by_head(size).to_mgpu()

    def store(ctx, attended, state, head):
        narrow = ir.MemRefType(attended.type).element_type
        first = arith.muli(_scalar(head), _i32(group))
        for t, (_, total, sums) in enumerate(state):
            out = (sums / total.broadcast_in_dim(sums.shape, (0,), layout)).astype(narrow)
            # A tile's rows behind the group repeat its last one.
            own = arith.minsi(arith.addi(_warp(), _i32(ROWS * t)), _i32(group - 1))
            place = arith.muli(arith.addi(first, own), _i32(size))
            _store_own(out, attended, (place,))

    layouts = (BY_ROW, BY_ROW, by_head(size))
    types = (REF, (layouts,) * spec.tiles, BY_ROW)
    plgpu.inline_mgpu(arg_types=types)(store)(attended, state, *scalars(head))


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

    @plgpu.inline_mgpu(arg_types=(REF,) * 4)
    def choose(ctx, found, logits, experts, shares):
        f32, index = ir.F32Type.get(), ir.IndexType.get()
        thread = arith.remui(mgpu.thread_idx(), _i32(128))
        own = arith.index_cast(index, arith.minui(thread, _i32(count - 1)))
        logit = memref.load(found, [own])
        exists = arith.cmpi(arith.CmpIPredicate.ult, thread, _i32(count))
        memref.store(logit, logits, [own])
        mgpu.warpgroup_barrier()
        better, greatest = _count_better(logits, count, logit, thread)
        log2_e = mgpu.c(1.4426950408889634, f32)
        weight = _exp2(arith.mulf(arith.subf(logit, greatest), log2_e))
        mgpu.warpgroup_barrier()  # all have read the logits
        place = arith.index_cast(index, arith.minui(better, _i32(top_k - 1)))
        chosen = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.ult, better, _i32(top_k)))
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

    @mgpu.fori(mgpu.c(count // width, index), ((_i32(0),) * 4, (own,) * 4))
    def counted(i, carry):
        better, greatest = map(list, carry)
        start = arith.muli(i, mgpu.c(width, index))
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(logits, (mgpu.ds(start, width),)))
        kind = ir.VectorType.get((4,), f32)
        for j in range(width):
            if j % 4 == 0:
                four = _elements(llvm.load(kind, mgpu.utils.getelementptr(pointer, [j], f32)))
            other = four[j % 4]
            greatest[j % 4] = arith.maxnumf(greatest[j % 4], other)
            more = arith.cmpf(arith.CmpFPredicate.OGT, other, own)
            same = arith.cmpf(arith.CmpFPredicate.OEQ, other, own)
            place = arith.addi(arith.index_cast(i32, start), _i32(j))
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

    @plgpu.inline_mgpu(arg_types=(REF,))
    def signal(ctx, counters):
        mgpu.warpgroup_barrier()
        _semaphore(counters, which).signal(1, memory_scope="gpu")

    signal(counters)


def wait(shape: Shape, counters: Any, which: int, count: int) -> None:
    """Waits until there were so many signals; then the consumer sees what was stored before."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(REF,))
    def wait(ctx, counters):
        _semaphore(counters, which).wait(count, decrement=False, memory_scope="gpu")

    wait(counters)


def arrive(shape: Shape, counters: Any, head: Any, split: Any, splits: Any, before: Any) -> None:
    """Says that an item of a head is done, and stores in ``before`` how many of the head's were
    done before. The last one's count starts again from zero."""
    if shape.interpret:
        before[0] = split
        return

    @plgpu.inline_mgpu(arg_types=(REF, REF, BY_ROW, BY_ROW))
    def arrive(ctx, counters, before, head, splits):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        place = _index(arith.addi(_scalar(head), _i32(shape.waits + 1)))
        pointer = mgpu.utils.memref_ptr(mgpu.memref_slice(counters, (place,)))
        last = arith.subi(_scalar(splits), _i32(1))
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            code = "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;"
            count: Any = llvm.inline_asm(
                i32, [pointer, last], code, "=r,l,r", has_side_effects=True
            )
            memref.store(count, before, [mgpu.c(0, index)])
        mgpu.warpgroup_barrier()

    arrive(counters, before, *scalars(head, splits))


def clear(shape: Shape, counters: Any) -> None:
    """Sets the counters to zero if this is the last block that needs them; the one behind those of
    the signals, of the blocks that have come here, starts again by itself, as do the heads'."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(REF,))
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


# --- shorthands -----------------------------------------------------------------------------------


def _vector(dtype: Any) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((ROWS,), dtype, layout=BY_ROW)


def _elements(register: ir.Value) -> list[ir.Value]:
    """A vector's elements."""
    [length] = ir.VectorType(register.type).shape
    return [
        vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(length)
    ]


def _packed(elements: Sequence[ir.Value]) -> ir.Value:
    """The elements as a vector."""
    kind = ir.VectorType.get((len(elements),), elements[0].type)
    return vector.from_elements(kind, elements)


def _with_registers(array: Any, registers: Sequence[ir.Value]) -> Any:
    """An array like that one, of other registers."""
    own = np.empty_like(array.registers)
    own.flat[:] = registers
    return mgpu.FragmentedArray(_registers=own, _layout=array.layout, _is_signed=array.is_signed)


def _mma(
    kind: str, a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]
) -> list[ir.Value]:
    """A warp's product of fragments of 16 x 16 and 16 x 8 elements, added to one of 16 x 8 (PTX
    ISA, Matrix Fragments for mma.m16n8k16)."""
    f32 = ir.F32Type.get()
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    struct = llvm.StructType.get_literal([f32] * 4)
    sums: Any = llvm.inline_asm(struct, [*a, *b, *c], code, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
    return [llvm.extractvalue(f32, sums, [i]) for i in range(4)]


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def _i32(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _scalar(values: Any) -> ir.Value:
    """What all elements of a vector [ROWS] are."""
    register = values.registers.flat[0]
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=[0])


def _warp() -> ir.Value:
    """The warp's number in its warpgroup."""
    return arith.remui(mgpu.warp_idx(), _i32(4))


def _semaphore(counters: Any, which: int) -> Any:
    return mgpu.SemaphoreRef(mgpu.utils.memref_ptr(mgpu.memref_slice(counters, which)))


def _exp2(x: ir.Value) -> Any:
    return llvm.inline_asm(x.type, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _where(condition: ir.Value, x: Any, otherwise: float) -> Any:
    """x if the condition holds, else a constant everywhere."""
    [length] = ir.VectorType(x.registers.flat[0].type).shape
    kind = ir.VectorType.get((length,), x.mlir_dtype)
    other = vector.broadcast(kind, mgpu.c(otherwise, x.mlir_dtype))
    registers = np.empty_like(x.registers)
    for index, register in np.ndenumerate(x.registers):
        registers[index] = arith.select(condition, register, other)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)


def _pointer(ref: Any, index: Sequence[Any], length: int, spread: bool) -> ir.Value:
    """Where a thread's ``length`` elements lie in a row that begins at ``index``; if it isn't
    spread over the threads, all have the same."""
    kind = ir.IndexType.get()
    places = [
        mgpu.c(at, kind) if isinstance(at, int) else arith.index_cast(kind, at) for at in index
    ]
    if spread:
        lane = arith.remui(mgpu.thread_idx(), _i32(32))
        own = arith.index_cast(kind, arith.muli(lane, _i32(length)))
        places[-1] = arith.addi(places[-1], own)
    return mgpu.utils.memref_ptr(mgpu.memref_slice(ref, tuple(places)))


def _load(
    ref: Any, index: Sequence[Any], size: int, layout: Any, shape: tuple[int, ...] | None = None
) -> Any:
    """A row of ``size`` elements, one vector for each thread; of one element, which each warp may
    have at another place, it is a vector of that ``shape``."""
    length = layout.vector_length
    kind = ir.VectorType.get((length,), ir.MemRefType(ref.type).element_type)
    registers = np.empty(layout.registers_shape(shape or (size,)), dtype=object)
    assert registers.size == 1
    registers.flat[0] = llvm.load(kind, _pointer(ref, index, length, size > 1))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _load_own(layout: Any, shape: tuple[int, int]) -> Callable[[Any, Sequence[Any]], Any]:
    """Loads a tile whose rows begin at an index that each warp knows for its own row."""
    return lambda ref, index: _load(ref, index, shape[1], layout, shape)


def _store_own(tile: Any, ref: Any, index: Sequence[Any]) -> None:
    """Stores a tile whose rows go where each warp wants its own to go."""
    (register,) = tile.registers.flat
    length = tile.layout.vector_length
    llvm.store(register, _pointer(ref, index, length, spread=True))


def _normalized(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    h = x.astype(jnp.float32)
    h = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + eps)
    return (h.astype(scale.dtype) * scale).astype(x.dtype)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, 1).astype(x.dtype)
