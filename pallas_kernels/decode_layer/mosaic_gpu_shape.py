"""What the kernel is specialised for: how a layer's work is cut, and the memory of a block."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

CONSUMERS = 2
ROWS = 4  # of a tile: one for each warp of a warpgroup
KEYS = 16  # that are worked on at once
LINE = 256  # elements; no dimension of what the copy engine fetches at once may be longer
TILE = 8192  # most elements of a tile; they have two bytes
MAX_MEMORY = 226 << 10  # bytes of a block's arrays; there is 1 KiB more, for its barriers
SCRATCH = 128  # float32 numbers, for sums across the warps of a consumer
HEAD_SIZES = (64, 128, 256)
MAX_EXPERTS = 128  # four for each thread of a warp
HELD = 2  # tiles of a consumer that are fetched while experts are chosen
PACE = 2000  # clock cycles between the first tiles that are fetched before experts are chosen
MIN_PAGES = 2  # of a worker's share of the keys: what results cost to merge


class Product(NamedTuple):
    """One product of the layer, cut into units of ``rows`` outputs.

    Attributes:
        outputs, inputs: of one matrix.
        parts: matrices that share the inputs: gate and up.
        before: units of the products before; the blocks take turns over all units, so that none
            has more to do in each product.
        chosen: how many experts' matrices are multiplied; 0 if there are none to choose from.
        summed: whether the experts' products are summed, each of inputs of its own; otherwise they
            follow each other.
        stack: tiles of ``ROWS`` rows that are fetched as one, since they are narrow.
    """

    outputs: int
    inputs: int
    parts: int
    before: int
    chosen: int = 0
    summed: bool = False
    stack: int = 1

    @property
    def rows(self) -> int:
        return ROWS * self.stack

    @property
    def units(self) -> int:
        return self.outputs // self.rows * (1 if self.summed else max(1, self.chosen))

    @property
    def chunk(self) -> int:
        """Inputs of a tile."""
        most = TILE // (self.rows * self.parts)
        return next(n for n in range(most, 0, -LINE) if self.inputs % n == 0)

    @property
    def chunks(self) -> int:
        """Tiles of a unit."""
        return self.inputs // self.chunk * (self.chosen if self.summed else 1)

    @property
    def vector(self) -> int:
        """Inputs of all that is summed."""
        return self.chunk * self.chunks

    @property
    def tile(self) -> tuple[int, int, int, int]:
        return (self.parts, self.rows, self.chunk // LINE, LINE)

    def first(self, block: Any, blocks: int) -> Any:
        """A block's first unit."""
        return lax.rem(block + blocks - self.before % blocks, blocks)

    def share(self, block: Any, blocks: int, consumer: Any = 0, consumers: int = 1) -> Any:
        """A block's units, or those of one of its consumers, which take turns."""
        own = lax.div(self.units - self.first(block, blocks) + blocks - 1, blocks)
        return lax.div(own - consumer + consumers - 1, consumers)

    def source(self, unit: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """Of a tile: which of the chosen experts, the first row of its matrix, and the chunk."""
        units, chunks = self.outputs // self.rows, self.inputs // self.chunk
        if self.summed:
            return lax.div(chunk, chunks), unit * self.rows, lax.rem(chunk, chunks)
        return lax.div(unit, units), lax.rem(unit, units) * self.rows, chunk


class Attention(NamedTuple):
    """The layer's attention.

    Attributes:
        kv_heads, group, size: KV heads, how many query heads share one, and their size.
        page_size: tokens.
        scale: of the scores, times log2(e): exponentials are taken to base 2.
        window: only a sequence's last ones are seen; None for all.
        rotates: whether queries and keys are rotated.
        eps: of the norm over each query and key; None for no norm.
    """

    kv_heads: int
    group: int
    size: int
    page_size: int
    scale: float
    window: int | None
    rotates: bool
    eps: float | None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def tiles(self) -> int:
        """Tiles of ``ROWS`` queries; what stands behind the group repeats its last one."""
        return -(-self.group // ROWS)


class Plan(NamedTuple):
    """How a sequence's keys are shared out; int32 scalars.

    An item is a KV head and ``each`` pages (of the last items of a head, fewer). Workers, which are
    the consumers of all blocks, take turns over the items.

    Attributes:
        new: the new token's position.
        first_key: the first one that is seen.
        first_page, pages: that hold what is seen.
        each: pages of an item.
        splits: items of a head.
    """

    new: Any
    first_key: Any
    first_page: Any
    pages: Any
    each: Any
    splits: Any

    @classmethod
    def of(cls, spec: Attention, workers: int, kv_len: Any) -> Plan:
        """The plan for a sequence of ``kv_len`` tokens, the new one among them."""
        new = jnp.maximum(kv_len, 1) - 1
        first_key = jnp.int32(0) if spec.window is None else jnp.maximum(new + 1 - spec.window, 0)
        first_page = lax.div(first_key, spec.page_size)
        pages = lax.div(new, spec.page_size) - first_page + 1
        most = max_splits(spec, workers)
        each = jnp.maximum(lax.div(pages + most - 1, most), MIN_PAGES)
        splits = lax.div(pages + each - 1, each)
        return cls(new, first_key, first_page, pages, each, splits)

    def items(self, spec: Attention, workers: int, worker: Any) -> Any:
        """How many items a worker has."""
        return lax.div(spec.kv_heads * self.splits - worker + workers - 1, workers)

    def item(self, spec: Attention, number: Any) -> tuple[Any, Any, Any, Any]:
        """An item's head, which of the head's items it is, its first page and its pages."""
        head, split = lax.rem(number, spec.kv_heads), lax.div(number, spec.kv_heads)
        start = split * self.each
        return head, split, self.first_page + start, jnp.minimum(self.each, self.pages - start)


def max_splits(spec: Attention, workers: int) -> int:
    """Most items of a head."""
    return max(1, workers // spec.kv_heads)


class Shape(NamedTuple):
    """What the kernel is specialised for.

    Attributes:
        dtype: of the weights and vectors.
        attention: of the layer.
        products: behind it.
        eps: of the two norms.
        top_k, normalize, scale: of the experts' choice; top_k is 0 without experts.
        blocks, consumers: of the grid, and of a block.
        interpret: the interpreter's settings; False on a GPU.
    """

    dtype: Any
    attention: Attention
    products: tuple[Product, ...]
    eps: tuple[float, float]
    top_k: int
    normalize: bool
    scale: float
    blocks: int
    consumers: int
    interpret: Any

    @property
    def workers(self) -> int:
        return self.blocks * self.consumers

    @property
    def waits(self) -> int:
        """Times that all wait for all: between attention and the products, and between those."""
        return len(self.products)

    @property
    def counters(self) -> int:
        """Of signals: for each wait, behind them for each KV head, and one of blocks."""
        return self.waits + self.attention.kv_heads + 1

    @property
    def exchanged(self) -> dict[str, int]:
        """The vectors that blocks exchange, by name, and their sizes."""
        out, last = self.products[0], self.products[-2]
        sizes = {"attended": out.inputs, "h": out.outputs}
        return sizes | {"gated": last.vector, "stream": last.outputs}

    @property
    def widest(self) -> int:
        """Inputs of the widest product."""
        return max(product.vector for product in self.products)

    @property
    def turned(self) -> int:
        """Rows of a consumer's queries, and the new key and value behind them."""
        return ROWS * self.attention.tiles + 2

    @property
    def held(self) -> int:
        """Tiles of the last product that each consumer gets early, in slots of their own: the
        memory has nothing else to do until the experts are chosen."""
        return HELD if self.top_k and self._slots >= 2 * HELD else 0

    @property
    def slots(self) -> int:
        """Slots of a consumer's ring, behind which are those of the tiles that are held."""
        return self._slots - self.held

    @property
    def _slots(self) -> int:
        other = 2 * (self.widest + self.turned * self.attention.size) + 4 * SCRATCH
        other += 4 * (2 * self.top_k + 8)
        return (MAX_MEMORY // self.consumers - other) // (2 * TILE)


def shared_memory(shape: Shape) -> dict[str, Any]:
    """The arrays of a block and the barriers that guard them."""
    consumers, spec, slots = shape.consumers, shape.attention, shape.slots + shape.held
    ring: Any = plgpu.SMEM((consumers, slots, TILE // LINE, LINE), shape.dtype)
    if shape.interpret:  # it can't copy to a part of an array in another shape
        tiles = [*(product.tile for product in shape.products), (spec.page_size, spec.size)]
        ring = [plgpu.SMEM((consumers, slots, *tile), shape.dtype) for tile in tiles]
    memory = {
        "ring": ring,
        "vector": plgpu.SMEM((consumers, shape.widest), shape.dtype),
        "turned": plgpu.SMEM((consumers, shape.turned, spec.size), shape.dtype),
        "scratch": plgpu.SMEM((consumers, SCRATCH), jnp.float32),
        "came": plgpu.SMEM((4,), jnp.int32),
        "full": plgpu.Barrier(num_barriers=consumers * slots),
        "free": plgpu.Barrier(num_barriers=consumers * slots),
        "passed": plgpu.Barrier(num_arrivals=consumers),
    }
    if shape.top_k:
        memory |= {
            "experts": plgpu.SMEM((consumers, shape.top_k), jnp.int32),
            "shares": plgpu.SMEM((consumers, shape.top_k), jnp.float32),
            "chosen": plgpu.Barrier(num_arrivals=consumers),
        }
    return memory
