"""Attention of a KV head's queries over the keys of an item, on the tensor cores.

Fragments of 16 queries meet 16 keys. All four warps of a consumer compute all scores, which takes
each a few instructions, and then each a quarter of the values' columns: so no warp needs what
another one has found. A thread keeps numbers of its own between the keys, in arrays whose elements
belong to threads and not to places of a matrix (Dao, FlashAttention-2, 2023; the fragments are
those of mma.m16n8k16 in the PTX ISA).
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

from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import KEYS, ROWS, Attention, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, int32, ir, llvm, vector

LOWEST = -1e30  # of a score: less than any, but no infinity, whose differences are no numbers
QUERIES = 16  # of a fragment, of which a thread has a part of two: its row and the eighth behind
WARPS = 4

State = Any
"""Of the queries: the highest score so far, the sum of the exponentials of scores less that, and
the sum of the values that they weigh. For the interpreter three arrays; otherwise, for each
fragment of queries, a thread's two highest scores and parts of two sums, and its part of the
weighed values."""


def _fragments(spec: Attention) -> int:
    return -(-spec.group // QUERIES)


def _of_threads(count: int, dtype: Any) -> tuple[plgpu.ShapeDtypeStruct, Any]:
    """The type of an array that holds ``count`` elements for each thread, and its layout."""
    layout = words.by_tile(32 * count, count)
    return plgpu.ShapeDtypeStruct((ROWS, 32 * count), dtype, layout=layout), layout


def _array(count: int, elements: Sequence[ir.Value]) -> Any:
    """Such an array of a thread's elements."""
    layout = words.by_tile(32 * count, count).to_mgpu()
    return words.of_register(layout, (ROWS, 32 * count), words.packed(elements))


def _elements(array: Any) -> list[ir.Value]:
    return words.elements(array.registers.flat[0])


def _values(spec: Attention) -> int:
    """A thread's numbers of a fragment's weighed values."""
    return spec.size // WARPS // 8 * 4


def _state_types(spec: Attention) -> tuple[Any, Any]:
    """The types of a state, and their layouts."""
    own = [_of_threads(count, jnp.float32) for count in (4, _values(spec))]
    one, layouts = (tuple(part) for part in zip(*own))
    return (one,) * _fragments(spec), (layouts,) * _fragments(spec)


def queries(shape: Shape, turned: Any) -> Any:
    """The queries, as ``attend`` needs them."""
    spec = shape.attention
    if shape.interpret:
        return turned[pl.ds(0, ROWS * spec.tiles)].astype(jnp.float32) * spec.scale
    count = spec.size // 4  # words of two elements
    one, _ = _of_threads(count, jnp.int32)

    @plgpu.inline_mgpu(arg_types=(words.REF,), return_type=(one,) * _fragments(spec))
    def queries(ctx, turned):
        row, column = _row_and_column()
        start, element = mgpu.utils.memref_ptr(turned), ir.MemRefType(turned.type).element_type
        fragments = []
        for t in range(_fragments(spec)):
            rows = [arith.addi(row, int32(QUERIES * t + 8 * half)) for half in range(2)]
            rows = [arith.minsi(own, int32(spec.group - 1)) for own in rows]
            places = [_place(own, column, spec.size) for own in rows]
            own = [
                word
                for j in range(spec.size // 32)
                for place in places
                for word in _four_words(start, arith.addi(place, int32(32 * j)), element)
            ]
            fragments.append(_array(count, own))
        return tuple(fragments)

    return queries(turned)


def no_state(shape: Shape) -> State:
    """Before the first key."""
    spec = shape.attention
    if shape.interpret:
        rows = ROWS * spec.tiles
        return jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros((rows, spec.size))

    @plgpu.inline_mgpu(return_type=_state_types(spec)[0])
    def no_state(ctx):
        lowest, zero = (mgpu.c(number, ir.F32Type.get()) for number in (LOWEST, 0.0))
        numbers, values = [lowest] * 2 + [zero] * 2, [zero] * _values(spec)
        one = _array(4, numbers), _array(len(values), values)
        return (one,) * _fragments(spec)

    return no_state()


def attend(shape: Shape, k: Any, v: Any, q: Any, state: State, low: Any, high: Any) -> State:
    """The state behind the keys k [KEYS, size] and values v, of which those from ``low`` on and
    before ``high`` count; there is one, and the others aren't read."""
    spec = shape.attention
    if shape.interpret:
        return _attend_jnp(k[...], v[...], q, state, low, high)
    types, layouts = _state_types(spec)
    of_queries = (_of_threads(spec.size // 4, jnp.int32)[1],) * _fragments(spec)
    arguments = (words.REF, words.REF, of_queries, layouts, words.BY_ROW, words.BY_ROW)

    @plgpu.inline_mgpu(arg_types=arguments, return_type=types)
    def attend(ctx, k, v, q, state, low, high):
        low, high = words.scalar_of(low), words.scalar_of(high)
        fragments = [_elements(own) for own in q]
        scores = _scores(spec, shape.dtype, k, fragments, low, high)
        seen = _seen(low, high)
        softmax = [
            _softmax(own, seen, _elements(numbers)) for own, (numbers, _) in zip(scores, state)
        ]
        values = _weighed(
            spec, shape.dtype, v, softmax, [_elements(sums) for _, sums in state], low, high
        )
        return tuple(
            (_array(4, numbers), _array(len(own), own))
            for (numbers, _, _), own in zip(softmax, values)
        )

    return attend(k, v, q, state, *words.scalars(low, high))


def _attend_jnp(k: Any, v: Any, q: Any, state: State, low: Any, high: Any) -> State:
    number = jnp.arange(k.shape[0])
    seen = (low <= number) & (number < high)
    key, value = (jnp.where(seen[:, None], x, 0).astype(jnp.float32) for x in (k, v))
    top, total, sums = state
    scores = jnp.where(seen, q @ key.T, LOWEST)
    new_top = jnp.maximum(top, scores.max(1))
    weights = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0)
    decay = jnp.exp2(top - new_top)
    return new_top, total * decay + weights.sum(1), sums * decay[:, None] + weights @ value


def store(shape: Shape, refs: Any, number: Any, state: State) -> None:
    """Stores an item's state: in ``marks`` [items, rows, 2] the highest scores and the sums of
    exponentials, in ``sums`` [items, rows, size] those of values. Both are exchanged."""
    spec, rows = shape.attention, ROWS * shape.attention.tiles
    if shape.interpret:
        top, total, sums = state
        for ref, part in ((refs.marks, jnp.stack([top, total], 1)), (refs.sums, sums)):
            ref[number] = lax.bitcast_convert_type(part, ref.dtype)
        return

    @plgpu.inline_mgpu(
        arg_types=(words.REF, words.REF, words.BY_ROW, _state_types(spec)[1]),
    )
    def store(ctx, marks, sums, number, state):
        number, warp = words.to_index(words.scalar_of(number)), words.warp_number()
        row, column = _row_and_column()
        own_columns = arith.addi(
            arith.muli(warp, int32(spec.size // WARPS)), arith.muli(column, int32(2))
        )
        for t, (numbers, values) in enumerate(state):
            numbers, values = _elements(numbers), _elements(values)
            for half in range(2):
                total = _over_columns(arith.addf, numbers[2 + half])
                own = arith.addi(row, int32(QUERIES * t + 8 * half))
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, own, int32(rows))):
                    place = [number, words.to_index(own)]
                    slice_ = mgpu.memref_slice(marks, (*place, 0))
                    two = words.packed([numbers[half], total])
                    llvm.store(two, mgpu.utils.memref_ptr(slice_))
                    for n in range(len(values) // 4):
                        two = words.packed(values[4 * n + 2 * half :][:2])
                        start = words.to_index(arith.addi(own_columns, int32(8 * n)))
                        slice_ = mgpu.memref_slice(sums, (*place, start))
                        llvm.store(two, mgpu.utils.memref_ptr(slice_))

    store(refs.marks, refs.sums, *words.scalars(number), state)


# --- a thread's part ------------------------------------------------------------------------------


def _row_and_column() -> tuple[ir.Value, ir.Value]:
    """Of a thread in a fragment of 8 x 4."""
    lane = words.thread_number(32)
    return arith.divui(lane, int32(4)), arith.remui(lane, int32(4))


def _place(row: ir.Value, column: ir.Value, size: int) -> ir.Value:
    """Where in rows of ``size`` elements a thread's first eight of them stand.

    Fragments may hold a row's elements in any order, if queries and keys do so alike: these make
    one load of what a thread needs for two instructions."""
    return arith.addi(arith.muli(row, int32(size)), arith.muli(column, int32(8)))


def _four_words(start: ir.Value, place: ir.Value, element: ir.Type) -> list[ir.Value]:
    kind = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    return words.elements(llvm.load(kind, mgpu.utils.getelementptr(start, [place], element)))


def _within(row: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """The row, or one that counts: what doesn't may be no number."""
    return arith.maxsi(arith.minsi(row, arith.subi(high, int32(1))), low)


def _scores(
    spec: Attention, dtype: Any, k: Any, q: list[list[ir.Value]], low: ir.Value, high: ir.Value
) -> list[list[list[ir.Value]]]:
    """Of each fragment and each eight keys a thread's four scores: two of a row, and two of the
    eighth behind."""
    row, column = _row_and_column()
    start, element = mgpu.utils.memref_ptr(k), ir.MemRefType(k.type).element_type
    zero, scale = (mgpu.c(number, ir.F32Type.get()) for number in (0.0, spec.scale))
    keys = [_within(arith.addi(row, int32(8 * b)), low, high) for b in range(2)]
    places = [_place(key, column, spec.size) for key in keys]
    # Two sums for each, since an instruction waits for the one whose result it adds to.
    sums = [[[[zero] * 4] * 2 for _ in keys] for _ in q]
    for j in range(spec.size // 32):
        for b, place in enumerate(places):
            key = _four_words(start, arith.addi(place, int32(32 * j)), element)
            for t, own in enumerate(q):
                a = own[8 * j : 8 * j + 4], own[8 * j + 4 : 8 * j + 8]
                for i in range(2):
                    rows = [part[2 * i + word] for word in range(2) for part in a]
                    halves = sums[t][b]
                    halves[i] = words.mma(dtype, rows, key[2 * i : 2 * i + 2], halves[i])
    return [
        [[arith.mulf(arith.addf(x, y), scale) for x, y in zip(*halves)] for halves in own]
        for own in sums
    ]


def _seen(low: ir.Value, high: ir.Value) -> list[list[ir.Value]]:
    """Of each eight keys whether a thread's two count."""
    _, column = _row_and_column()

    def counts(place: int) -> ir.Value:
        key = arith.addi(arith.muli(column, int32(2)), int32(place))
        above = arith.cmpi(arith.CmpIPredicate.sge, key, low)
        return arith.andi(above, arith.cmpi(arith.CmpIPredicate.slt, key, high))

    return [[counts(8 * b + i) for i in range(2)] for b in range(2)]


def _softmax(
    scores: list[list[ir.Value]], seen: list[list[ir.Value]], numbers: list[ir.Value]
) -> tuple[list[ir.Value], list[ir.Value], list[list[ir.Value]]]:
    """The new highest scores and sums, how much what came before counts, and of each eight keys the
    four weights."""
    lowest, zero = (mgpu.c(number, ir.F32Type.get()) for number in (LOWEST, 0.0))
    masked = [
        [arith.select(there[i % 2], own[i], lowest) for i in range(4)]
        for own, there in zip(scores, seen)
    ]
    tops, totals, decays = [], [], []
    weights: list[list[Any]] = [[None] * 4, [None] * 4]
    for half in range(2):
        own = [four[2 * half + i] for four in masked for i in range(2)]
        top = _over_columns(arith.maxnumf, functools.reduce(arith.maxnumf, own))
        top = arith.maxnumf(top, numbers[half])
        total = decay = words.exp2(arith.subf(numbers[half], top))
        total = arith.mulf(total, numbers[2 + half])
        for b in range(2):
            for i in range(2):
                place = 2 * half + i
                weight = words.exp2(arith.subf(masked[b][place], top))
                weights[b][place] = arith.select(seen[b][i], weight, zero)
                total = arith.addf(total, weights[b][place])
        tops.append(top)
        totals.append(total)
        decays.append(decay)
    return [*tops, *totals], decays, weights


def _weighed(
    spec: Attention,
    dtype: Any,
    v: Any,
    softmax: Sequence[Any],
    sums: list[list[ir.Value]],
    low: ir.Value,
    high: ir.Value,
) -> list[list[ir.Value]]:
    """The sums of values with those of the keys."""
    start, element = mgpu.utils.memref_ptr(v), ir.MemRefType(v.type).element_type
    lane = words.thread_number(32)
    # A lane names a row of eight elements: of 16 keys, at two places.
    key = _within(arith.remui(lane, int32(KEYS)), low, high)
    column = arith.addi(
        arith.muli(words.warp_number(), int32(spec.size // WARPS)),
        arith.muli(arith.divui(lane, int32(KEYS)), int32(8)),
    )
    place = arith.addi(arith.muli(key, int32(spec.size)), column)
    rows = [_weights(dtype, weights) for _, _, weights in softmax]
    out: list[list[ir.Value]] = [
        [arith.mulf(x, decays[i % 4 // 2]) for i, x in enumerate(own)]
        for own, (_, decays, _) in zip(sums, softmax)
    ]
    for n in range(0, _values(spec) // 4, 2):
        pointer = mgpu.utils.getelementptr(start, [arith.addi(place, int32(8 * n))], element)
        code = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
        found = words.several(4, [pointer], code, "r")
        for own, weights in zip(out, rows):
            for i in range(2):
                four = slice(4 * (n + i), 4 * (n + i) + 4)
                own[four] = words.mma(dtype, weights, found[2 * i : 2 * i + 2], own[four])
    return out


def _weights(dtype: Any, weights: list[list[ir.Value]]) -> list[ir.Value]:
    """The weights of 16 keys as a fragment that is multiplied."""
    narrow, i32 = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)), ir.IntegerType.get_signless(32)
    fragment = []
    for own in weights:
        for half in range(2):
            two = words.packed(own[2 * half : 2 * half + 2])
            two = arith.truncf(ir.VectorType.get((2,), narrow), two)
            [word] = words.elements(vector.bitcast(ir.VectorType.get((1,), i32), two))
            fragment.append(word)
    return fragment


def _over_columns(combine: Any, x: ir.Value) -> ir.Value:
    """Over the four threads that have a row."""
    return words.over_threads(combine, x, (1, 2))
