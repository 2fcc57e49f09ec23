"""Short words for Mosaic GPU's own arrays, of which Pallas' inline parts are made.

Inline parts take no scalars: they come as vectors of one element for each row of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.mosaic_gpu_shape import LINE, ROWS

# The dialects that Mosaic GPU is written in.
arith, ir, llvm = mgpu.utils.arith, mgpu.utils.ir, mgpu.utils.llvm
memref, scf, vector = mgpu.utils.memref, mgpu.utils.scf, mgpu.utils.vector

REF = plgpu.RefType()


def by_tile(width: int, vector: int) -> Any:
    """The registers' layout of a tile whose rows consist of lines of that width: a warp has a row,
    a thread ``vector`` elements of each line."""
    tiling = Tiling(((ROWS, width), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


BY_ROW = by_tile(LINE, LINE // 32).reduce((1,))
"""Of a vector with one element for each row of a tile."""
ROW = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=BY_ROW)
"""The type of such a vector of float32."""


def scalars(*values: Any) -> tuple[jax.Array, ...]:
    """int32 scalars as vectors [ROWS]."""
    return tuple(plgpu.layout_cast(jnp.full((ROWS,), value, jnp.int32), BY_ROW) for value in values)


def elements(register: ir.Value) -> list[ir.Value]:
    """A vector's elements."""
    [length] = ir.VectorType(register.type).shape
    return [
        vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(length)
    ]


def packed(elements: Sequence[ir.Value]) -> ir.Value:
    """The elements as a vector."""
    kind = ir.VectorType.get((len(elements),), elements[0].type)
    return vector.from_elements(kind, elements)


def of_register(layout: Any, shape: tuple[int, ...], register: ir.Value) -> Any:
    """An array of which each thread has one vector."""
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    assert registers.size == 1
    registers.flat[0] = register
    own = ir.VectorType(register.type).element_type
    signed = True if isinstance(own, ir.IntegerType) else None
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def statement(operands: Sequence[ir.Value], code: str, constraints: str) -> None:
    """PTX without a result."""
    kind: Any = ir.Type.parse("!llvm.void")
    llvm.inline_asm(kind, operands, code, constraints, has_side_effects=True)


def several(
    count: int, operands: Sequence[ir.Value], code: str, constraints: str
) -> list[ir.Value]:
    """PTX that gives so many words, which are its first operands."""
    i32 = ir.IntegerType.get_signless(32)
    outputs = ",".join(["=r"] * count)
    kind: Any = i32 if count == 1 else llvm.StructType.get_literal([i32] * count)
    result: Any = llvm.inline_asm(
        kind, operands, code, f"{outputs},{constraints}", has_side_effects=True
    )
    return [result] if count == 1 else [llvm.extractvalue(i32, result, [i]) for i in range(count)]


def mma(
    dtype: Any, a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]
) -> list[ir.Value]:
    """A warp's product of fragments of 16 x 16 and 16 x 8 elements, added to one of 16 x 8 of
    float32 (PTX ISA, Matrix Fragments for mma.m16n8k16)."""
    f32, kind = ir.F32Type.get(), {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    struct = llvm.StructType.get_literal([f32] * 4)
    sums: Any = llvm.inline_asm(struct, [*a, *b, *c], code, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
    return [llvm.extractvalue(f32, sums, [i]) for i in range(4)]


def exp2(x: ir.Value) -> ir.Value:
    """Approximately; denormal numbers count as zero."""
    result: Any = llvm.inline_asm(x.type, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")
    return result


def to_index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def int32(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def scalar_of(values: Any) -> ir.Value:
    """What all elements of a vector [ROWS] are."""
    register = values.registers.flat[0]
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=[0])


def warp_number() -> ir.Value:
    """The warp's number in its warpgroup."""
    return arith.remui(mgpu.warp_idx(), int32(4))


def thread_number(threads: int) -> ir.Value:
    """The thread's number among so many: 32 for its warp, 128 for its warpgroup."""
    return arith.remui(mgpu.thread_idx(), int32(threads))


def over_threads(combine: Callable, x: ir.Value, distances: Sequence[int]) -> ir.Value:
    """``combine`` of all that threads at such distances in a warp have."""
    for distance in distances:
        x = combine(x, mgpu.utils.shfl_bfly(x, distance))
    return x


def row_pointer(ref: Any, index: Sequence[Any], length: int, spread: bool) -> ir.Value:
    """Where a thread's ``length`` elements lie in a row that begins at ``index``; if it isn't
    spread over the threads, all have the same."""
    kind = ir.IndexType.get()
    places = [
        mgpu.c(at, kind) if isinstance(at, int) else arith.index_cast(kind, at) for at in index
    ]
    if spread:
        own = arith.index_cast(kind, arith.muli(thread_number(32), int32(length)))
        places[-1] = arith.addi(places[-1], own)
    return mgpu.utils.memref_ptr(mgpu.memref_slice(ref, tuple(places)))


def load_row(
    ref: Any, index: Sequence[Any], size: int, layout: Any, shape: tuple[int, ...] | None = None
) -> Any:
    """A row of ``size`` elements, one vector for each thread; of one element, which each warp may
    have at another place, it is a vector of that ``shape``."""
    length = layout.vector_length
    kind = ir.VectorType.get((length,), ir.MemRefType(ref.type).element_type)
    register = llvm.load(kind, row_pointer(ref, index, length, size > 1))
    return of_register(layout, shape or (size,), register)


def load_rows(layout: Any, shape: tuple[int, int]) -> Callable[[Any, Sequence[Any]], Any]:
    """Loads a tile whose rows begin at an index that each warp knows for its own row."""
    return lambda ref, index: load_row(ref, index, shape[1], layout, shape)


def store_rows(tile: Any, ref: Any, index: Sequence[Any]) -> None:
    """Stores a tile whose rows go where each warp wants its own to go."""
    (register,) = tile.registers.flat
    length = tile.layout.vector_length
    llvm.store(register, row_pointer(ref, index, length, spread=True))
