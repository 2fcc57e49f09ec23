"""Attention's parts in terms of Mosaic GPU's own arrays, each with its meaning in jnp for the
interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import ROWS, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, ir
from pallas_kernels.rope_kv_write.reference import rotate

LOWEST = -1e30  # of a score: less than any, but no infinity, whose differences are no numbers
MERGED_AT_ONCE = 12  # items' results whose loads are in flight together


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
        places: list[Any] = [arith.addi(warp, words.int32(ROWS * t)) for t in range(tiles)]
        sources: list[Any] = [arith.minsi(place, words.int32(group - 1)) for place in places]
        places += [words.int32(ROWS * tiles + i) for i in range(2)]
        sources += [words.int32(group + i) for i in range(2)]
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


def queries(shape: Shape, turned: Any) -> tuple[jax.Array, ...]:
    """The tiles of queries, scaled, float32 [ROWS, size] each."""
    spec = shape.attention
    layout = words.by_head(spec.size)
    if shape.interpret:
        tiles = [turned[pl.ds(ROWS * t, ROWS)].astype(jnp.float32) for t in range(spec.tiles)]
        return tuple(tile * spec.scale for tile in tiles)
    tile = plgpu.ShapeDtypeStruct((ROWS, spec.size), jnp.float32, layout=layout)
    load = words.load_rows(layout.to_mgpu(), (ROWS, spec.size))

    @plgpu.inline_mgpu(arg_types=(words.REF,), return_type=(tile,) * spec.tiles)
    def queries(ctx, turned):
        f32 = ir.F32Type.get()
        rows = (arith.addi(words.warp_number(), words.int32(ROWS * t)) for t in range(spec.tiles))
        return tuple(load(turned, (row, 0)).astype(f32) * mgpu.c(spec.scale, f32) for row in rows)

    return queries(turned)


State = tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
"""Of each tile of queries: the highest score so far [ROWS], the sum of the exponentials of scores
less that [ROWS], and the sum of the values that they weigh [ROWS, size]."""


def no_state(shape: Shape) -> State:
    """Before the first key."""
    spec = shape.attention
    one = (
        words.constant(shape, LOWEST),
        words.constant(shape, 0),
        words.constant(shape, 0, spec.size),
    )
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
        parts = []
        for tile in q:
            scores = jnp.where(seen, tile @ key.T, LOWEST)
            top = scores.max(1)
            weights = jnp.where(seen, jnp.exp2(scores - top[:, None]), 0)
            parts.append((top, weights.sum(1), weights @ value))
        return tuple(_merged_jnp(one, *part) for one, part in zip(state, parts))
    layout: Any = words.by_head(spec.size).to_mgpu()

    def row(ref: Any, index: Any) -> Any:
        own = words.load_row(ref, (index, 0), spec.size, layout.reduce((0,))).astype(
            ir.F32Type.get()
        )
        return own.broadcast_in_dim((ROWS, spec.size), (1,), layout)

    def step(ctx, k, v, q, state, low, high):
        low, high = words.scalar_of(low), words.scalar_of(high)
        last = arith.subi(high, words.int32(1))
        # What doesn't count is replaced by what does, since it may be no number.
        index = [arith.maxsi(arith.minsi(words.int32(i), last), low) for i in range(keys)]
        seen = [
            arith.cmpi(arith.CmpIPredicate.eq, at, words.int32(i)) for i, at in enumerate(index)
        ]
        rows = [row(k, at) for at in index]
        scores = [[(q * key).reduce("add", (1,)) for key in rows] for q in q]
        rows = [row(v, at) for at in index]
        return tuple(_joined(one, own, seen, rows, layout) for one, own in zip(state, scores))

    return _with_state(
        shape, step, (words.REF, words.REF, (words.by_head(spec.size),) * spec.tiles), 2
    )(k, v, q, state, *words.scalars(low, high))


def _joined(state: Any, scores: list[Any], seen: list[Any], values: list[Any], layout: Any) -> Any:
    """A tile's state behind some more keys."""
    top, total, sums = state
    scores = [words.where(one, score, LOWEST) for one, score in zip(seen, scores)]
    new_top = functools.reduce(lambda a, b: a.max(b), scores, top)
    weights = [
        words.where(one, (score - new_top).exp2(approx=True), 0.0)
        for one, score in zip(seen, scores)
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

            def own(t: int, number: Any = number, there: Any = there) -> list[jax.Array]:
                stored = (ref[number, pl.ds(ROWS * t, ROWS)] for ref in parts)
                return [jnp.where(there, x, none) for x, none in zip(stored, (LOWEST, 0, 0))]

            state = tuple(_merged_jnp(one, *own(t)) for t, one in enumerate(state))
        return state
    layout: Any = words.by_head(spec.size).to_mgpu()
    narrow, load = layout.reduce((1,)), words.load_rows(layout, (ROWS, spec.size))

    def step(ctx, tops, totals, sums, state, head, first, splits):
        head, first, splits = map(words.scalar_of, (head, first, splits))
        warp = words.warp_number()
        numbers, there = [], []
        for i in range(MERGED_AT_ONCE):
            split = arith.addi(first, words.int32(i))
            there.append(arith.cmpi(arith.CmpIPredicate.slt, split, splits))
            split = arith.minsi(split, arith.subi(splits, words.int32(1)))
            numbers.append(arith.addi(arith.muli(split, words.int32(spec.kv_heads)), head))

        def column(ref: Any, number: Any, row: Any) -> Any:
            return words.load_row(ref, (number, row), 1, narrow, (ROWS,))

        merged = []
        for t, (top, total, summed) in enumerate(state):
            row = arith.addi(warp, words.int32(ROWS * t))
            own = [
                words.where(is_there, column(tops, number, row), LOWEST)
                for number, is_there in zip(numbers, there)
            ]
            counts = [column(totals, number, row) for number in numbers]
            values = [load(sums, (number, row, 0)) for number in numbers]
            new_top = functools.reduce(lambda a, b: a.max(b), own, top)
            weights = [
                words.where(is_there, (one - new_top).exp2(approx=True), 0.0)
                for one, is_there in zip(own, there)
            ]
            merged.append(_weighed(top, new_top, total, summed, weights, counts, values, layout))
        return tuple(merged)

    return _with_state(shape, step, (words.REF, words.REF, words.REF), 3)(
        *parts, state, *words.scalars(head, first, splits)
    )


def _merged_jnp(state: Any, top: jax.Array, total: jax.Array, sums: jax.Array) -> Any:
    """A tile's state with that of other keys."""
    old_top, old_total, old_sums = state
    new_top = jnp.maximum(old_top, top)
    old, new = jnp.exp2(old_top - new_top), jnp.exp2(top - new_top)
    return new_top, old_total * old + total * new, old_sums * old[:, None] + sums * new[:, None]


def _with_state(shape: Shape, step: Callable, before: tuple, count: int) -> Callable:
    """``step``, whose arguments are of the types ``before``, then a state, then ``count``
    scalars, and which gives a state."""
    spec = shape.attention
    layouts = (words.BY_ROW, words.BY_ROW, words.by_head(spec.size))
    sizes = ((ROWS,), (ROWS,), (ROWS, spec.size))
    one = tuple(
        plgpu.ShapeDtypeStruct(size, jnp.float32, layout=layout)
        for size, layout in zip(sizes, layouts)
    )
    types = (*before, (layouts,) * spec.tiles, *(words.BY_ROW,) * count)
    return plgpu.inline_mgpu(arg_types=types, return_type=(one,) * spec.tiles)(step)


def store_heads(shape: Shape, attended: Any, state: State, head: Any) -> None:
    """Stores a head's result in the vector of all heads' queries, which is one of those that are
    exchanged."""
    spec = shape.attention
    group, size = spec.group, spec.size
    if shape.interpret:
        rows = jnp.concatenate([sums / total[:, None] for _, total, sums in state])[:group]
        bits = lax.bitcast_convert_type(rows.reshape(-1).astype(shape.dtype), attended.dtype)
        attended[pl.ds(head * group * size, group * size)] = bits
        return
    layout: Any = words.by_head(size).to_mgpu()

    def store(ctx, attended, state, head):
        narrow = mgpu.utils.dtype_to_ir_type(jnp.dtype(shape.dtype))
        first = arith.muli(words.scalar_of(head), words.int32(group))
        for t, (_, total, sums) in enumerate(state):
            out = (sums / total.broadcast_in_dim(sums.shape, (0,), layout)).astype(narrow)
            # A tile's rows behind the group repeat its last one.
            own = arith.minsi(
                arith.addi(words.warp_number(), words.int32(ROWS * t)), words.int32(group - 1)
            )
            place = arith.muli(arith.addi(first, own), words.int32(size))
            words.store_rows(out, attended, (place,))

    layouts = (words.BY_ROW, words.BY_ROW, words.by_head(size))
    types = (words.REF, (layouts,) * spec.tiles, words.BY_ROW)
    plgpu.inline_mgpu(arg_types=types)(store)(attended, state, *words.scalars(head))
