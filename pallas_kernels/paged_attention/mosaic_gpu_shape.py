"""What the Mosaic GPU kernel is specialised for, and the shared memory that follows from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CONSUMERS = 2
CONSUMER_ROWS = 64  # rows of one wgmma
ROWS = CONSUMERS * CONSUMER_ROWS
WARPS = 4  # of a warpgroup
CHUNK = 8  # rows after which the pattern of swizzled memory repeats


@dataclass(frozen=True)
class Shape:
    """What the kernel is specialised for.

    Attributes:
        dtype: of queries, keys and values.
        heads, kv_heads, head_size, page_size, table_width: of the arguments.
        tile_tokens: queries in a tile, a power of two from 8 on.
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
    tile_tokens: int
    scale: float
    window: int | None
    cores: int
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

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


def shared_memory(shape: Shape) -> dict[str, Any]:
    """The scratch arrays of a block and the barriers that guard them: of each slot, one for its
    being full and one for its being free again."""
    smem = functools.partial(plgpu.SMEM, dtype=shape.dtype)
    swizzle = plgpu.SwizzleTransform(shape.swizzle)
    tiled = (plgpu.TilingTransform((CHUNK, shape.columns)), swizzle)
    queries = (shape.query_slots, shape.parts, ROWS, shape.columns)
    if shape.interpret:
        q_smem = smem(queries)
    else:
        # The copy engine starts at any token only if it needn't cut the tokens into tiles. One
        # part's tiles lie one behind the other, so that they needn't be cut.
        q_smem = plgpu.RefUnion(
            smem(queries, transforms=tiled), smem(queries, transforms=(swizzle,))
        )
    keys = (shape.key_slots, shape.keys, shape.head_size)
    barriers = functools.partial(plgpu.Barrier, num_barriers=shape.key_slots)
    query_barriers = functools.partial(plgpu.Barrier, num_barriers=shape.query_slots)
    return {
        "q_smem": q_smem,
        "k_smem": smem(keys, transforms=tiled),
        "v_smem": smem(keys, transforms=tiled),
        "rest_smem": smem((CONSUMERS, CONSUMER_ROWS, shape.columns)),
        "q_full": query_barriers(num_arrivals=shape.group * shape.parts),
        "q_free": query_barriers(num_arrivals=CONSUMERS),
        "k_full": barriers(num_arrivals=shape.pages),
        "v_full": barriers(num_arrivals=shape.pages),
        "k_free": barriers(num_arrivals=CONSUMERS),
        "v_free": barriers(num_arrivals=CONSUMERS),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
