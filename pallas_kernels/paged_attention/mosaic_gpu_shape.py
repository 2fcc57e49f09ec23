"""What the Mosaic GPU kernels are specialised for, and the shared memory that follows from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arithmetic import power_of_two

CONSUMERS = 2
CONSUMER_ROWS = 64  # rows of one wgmma
ROWS = CONSUMERS * CONSUMER_ROWS
WARPS = 4  # of a warpgroup
CHUNK = 8  # rows after which the pattern of swizzled memory repeats
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # The barriers that this leaves out guard memory that a thread reads and writes itself. In our
    # kernels each thread does both to the same elements only, and commit_smem is a barrier.
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=0,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


@dataclass(frozen=True)
class CommonShape:
    """What every kernel is specialised for.

    Attributes:
        dtype: of queries, keys and values.
        heads, kv_heads, head_size, page_size, table_width: of the arguments.
        scale: of the scores, times log2(e).
        window: the sliding window.
        cores: multiprocessors to use.
        interpret: ``InterpretGPUParams`` or None.
    """

    dtype: Any
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    table_width: int
    scale: float
    window: int | None
    cores: int
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def swizzle(self) -> int:
        """Bytes of a swizzled row: the most that divide a head's row."""
        return next(size for size in (128, 64, 32) if self.head_size * 2 % size == 0)

    @property
    def columns(self) -> int:
        """Elements of a swizzled row."""
        return self.swizzle // 2

    @property
    def parts(self) -> int:
        """Swizzled rows in a head's row."""
        return self.head_size // self.columns

    def part(self, i: int) -> Any:
        """The columns of the i-th part."""
        return pl.ds(i * self.columns, self.columns)

    @property
    def producer_warps(self) -> int:
        """Warps that issue copies, each its own; the interpreter knows no warps."""
        return 1 if self.interpret else WARPS

    def laid_out(self, array: jax.Array, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
        """``array`` in a register layout; the interpreter knows none."""
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def iota(self, shape: tuple[int, ...], axis: int, layout: Any = plgpu.Layout.WGMMA):
        return self.laid_out(lax.broadcasted_iota(jnp.int32, shape, axis), layout)

    def full(self, shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA):
        return self.laid_out(jnp.full(shape, value, jnp.float32), layout)

    def smem(self, shape: tuple[int, ...]) -> Any:
        """Plain shared memory."""
        return plgpu.SMEM(shape, self.dtype)

    def operand_smem(self, shape: tuple[int, ...]) -> Any:
        """Shared memory of a matrix that the tensor cores read."""
        return plgpu.SMEM(shape, self.dtype, transforms=self._tiled)

    def query_smem(self, shape: tuple[int, ...]) -> Any:
        """Shared memory [..., parts, rows, columns] of queries, which ``query_refs`` unpacks."""
        if self.interpret:
            return self.smem(shape)
        # The copy engine starts at any row only if it needn't cut the rows into tiles. One part's
        # tiles lie one behind the other, so that they needn't be cut.
        plain = plgpu.SMEM(shape, self.dtype, transforms=(self._tiled[1],))
        return plgpu.RefUnion(self.operand_smem(shape), plain)

    def query_refs(self, smem: Any) -> tuple[Any, Any]:
        """The same memory for the tensor cores, and for the copy engine."""
        return (smem, smem) if self.interpret else tuple(smem)

    @property
    def _tiled(self) -> tuple[Any, Any]:
        return (
            plgpu.TilingTransform((CHUNK, self.columns)),
            plgpu.SwizzleTransform(self.swizzle),
        )


@dataclass(frozen=True)
class Shape(CommonShape):
    """What the kernel for tiles of queries is specialised for.

    Attributes:
        tile_tokens: queries in a tile, a power of two from 8 on.
    """

    tile_tokens: int

    @property
    def keys(self) -> int:
        """Keys in a tile of keys."""
        return 128 if self.head_size <= 128 else 64

    @property
    def pages(self) -> int:
        """Pages in a tile of keys."""
        return self.keys // self.page_size

    @property
    def query_slots(self) -> int:
        return 2 if self.head_size <= 128 else 1

    @property
    def key_slots(self) -> int:
        return 4 if self.head_size <= 64 else 2


def shared_memory(shape: Shape) -> dict[str, Any]:
    """The scratch arrays of a block and the barriers that guard them: of each slot, one for its
    being full and one for its being free again."""
    queries = (shape.query_slots, shape.parts, ROWS, shape.columns)
    keys = (shape.key_slots, shape.keys, shape.head_size)
    barriers = functools.partial(plgpu.Barrier, num_barriers=shape.key_slots)
    query_barriers = functools.partial(plgpu.Barrier, num_barriers=shape.query_slots)
    return {
        "q_smem": shape.query_smem(queries),
        "k_smem": shape.operand_smem(keys),
        "v_smem": shape.operand_smem(keys),
        "rest_smem": shape.smem((CONSUMERS, CONSUMER_ROWS, shape.columns)),
        "q_full": query_barriers(num_arrivals=shape.group * shape.parts),
        "q_free": query_barriers(num_arrivals=CONSUMERS),
        "k_full": barriers(num_arrivals=shape.pages),
        "v_full": barriers(num_arrivals=shape.pages),
        "k_free": barriers(num_arrivals=CONSUMERS),
        "v_free": barriers(num_arrivals=CONSUMERS),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }


# --- decoding -----------------------------------------------------------------------------------

PART_COLUMNS = 16  # of an unfinished result that are copied, and merged, at once
PARTS_AT_ONCE = 16  # unfinished results of a lane whose copies are under way together


@dataclass(frozen=True)
class DecodeShape(CommonShape):
    """What the kernels for decoding are specialised for."""

    @property
    def streams(self) -> int:
        """Pairs of a producer and a consumer in a block: what shared memory has room for."""
        return 2 if self.head_size <= 128 else 1

    @property
    def keys(self) -> int:
        """Keys in a tile of keys."""
        return 64

    @property
    def pages(self) -> int:
        """Pages in a tile of keys."""
        return self.keys // self.page_size

    @property
    def key_slots(self) -> int:
        return 4 if self.head_size <= 64 else 2

    @property
    def members(self) -> int:
        """Rows of a tile of queries that are loaded: the GQA group, and queries behind it up to a
        number that swizzled memory can take."""
        return max(CHUNK, power_of_two(self.group))

    @property
    def padded_rows(self) -> int:
        """Rows of an item's unfinished results: ``members`` for each KV head, in whole tiles."""
        return -(-self.kv_heads * self.members // CONSUMER_ROWS) * CONSUMER_ROWS


def decode_memory(shape: DecodeShape) -> dict[str, Any]:
    """The scratch arrays of a block that decodes and the barriers that guard them."""
    streams = shape.streams
    keys = (streams, shape.key_slots, shape.keys, shape.head_size)
    key_barriers = functools.partial(plgpu.Barrier, num_barriers=streams * shape.key_slots)
    query_barriers = functools.partial(plgpu.Barrier, num_barriers=streams)
    return {
        "q_smem": shape.query_smem((streams, shape.parts, CONSUMER_ROWS, shape.columns)),
        "k_smem": shape.operand_smem(keys),
        "v_smem": shape.operand_smem(keys),
        "out_smem": shape.smem((streams, CONSUMER_ROWS, shape.columns)),
        "values_smem": _part_smem(streams),
        "top_smem": plgpu.SMEM((streams, CONSUMER_ROWS), jnp.float32),
        "total_smem": plgpu.SMEM((streams, CONSUMER_ROWS), jnp.float32),
        "q_full": query_barriers(num_arrivals=shape.parts),
        "q_free": query_barriers(num_arrivals=1),
        "k_full": key_barriers(num_arrivals=shape.pages),
        "v_full": key_barriers(num_arrivals=shape.pages),
        "k_free": key_barriers(num_arrivals=1),
        "v_free": key_barriers(num_arrivals=1),
    }


def merge_memory(shape: DecodeShape) -> dict[str, Any]:
    """The scratch arrays of a block that merges, and the barriers of its slots."""
    vectors = plgpu.SMEM((PARTS_AT_ONCE, CONSUMER_ROWS), jnp.float32)
    return {
        "values_smem": _part_smem(PARTS_AT_ONCE),
        "top_smem": vectors,
        "total_smem": vectors,
        "out_smem": shape.smem((CONSUMER_ROWS, PART_COLUMNS)),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=PARTS_AT_ONCE),
    }


def _part_smem(slots: int) -> Any:
    """Shared memory of ``slots`` tiles of unfinished results."""
    transforms = (
        plgpu.TilingTransform((CHUNK, PART_COLUMNS)),
        plgpu.SwizzleTransform(PART_COLUMNS * 4),
    )
    return plgpu.SMEM((slots, CONSUMER_ROWS, PART_COLUMNS), jnp.float32, transforms=transforms)
