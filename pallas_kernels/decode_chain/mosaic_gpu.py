"""The op on Hopper GPUs, in Pallas with the Mosaic GPU backend: one persistent kernel.

For one token each weight is read once, and a product of its own is over before its loads have
ramped up: what counts is that the memory never waits. So each multiprocessor has one block for all
products. Its producer, a warpgroup, lets the copy engine fetch rows of the weights into rings of
shared memory, whatever the consumers wait for; they, two warpgroups with a ring each, multiply.
Between products they wait until all blocks have stored their part of the vector that the next
product needs.

Four rows of a weight are a tile, and four units' rows of gate and up are one. Each warp has a row,
or one of each, and its threads sum what they load: no warp waits for another one, and no product
needs a second pass over its result.

Blocks count their arrivals in an array that is zero before and after: nobody else sees it change,
so for XLA it is a constant like any other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_chain.types import ChainWeights
from pallas_kernels.lowering import hopper_cores

CONSUMERS = 2
ROWS = 4  # of a tile: one for each warp of a warpgroup
LINE = 256  # elements; no dimension of what the copy engine fetches at once may be longer
TILE = 8192  # most elements of a tile; they have two bytes
WAITS = 3  # between the four products
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of each thread
MAX_MEMORY = 226 << 10  # bytes of a block's arrays; there is 1 KiB more, for its barriers
SCRATCH = 128  # float32 numbers, for sums across the warps of a consumer
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)
BY_TILE = plgpu.Layout.TILED(
    Tiling(((ROWS, LINE), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
"""The registers' layout of a tile: a warp has a row, a thread eight elements of each line."""
BY_ROW = BY_TILE.reduce((1,))
"""Of a vector with one element for each row of a tile."""


class Product(NamedTuple):
    """One product of the chain, cut into units of ``ROWS`` outputs.

    Attributes:
        outputs, inputs: the weight's shape.
        parts: weights that share the inputs: gate and up.
        before: units of the products before; the blocks take turns over all units, so that none
            has more to do in each product.
    """

    outputs: int
    inputs: int
    parts: int
    before: int

    @property
    def units(self) -> int:
        return self.outputs // ROWS

    @property
    def chunk(self) -> int:
        """Inputs of a tile."""
        most = TILE // (ROWS * self.parts)
        return next(n for n in range(most, 0, -LINE) if self.inputs % n == 0)

    @property
    def chunks(self) -> int:
        """Tiles of a unit."""
        return self.inputs // self.chunk

    @property
    def tile(self) -> tuple[int, int, int, int]:
        return (self.parts, ROWS, self.chunk // LINE, LINE)

    def first(self, block: Any, blocks: int) -> Any:
        """A block's first unit."""
        return lax.rem(block + blocks - self.before % blocks, blocks)

    def share(self, block: Any, blocks: int, consumer: Any = 0, consumers: int = 1) -> Any:
        """A block's units, or those of one of its consumers, which take turns."""
        own = lax.div(self.units - self.first(block, blocks) + blocks - 1, blocks)
        return lax.div(own - consumer + consumers - 1, consumers)


class _Shape(NamedTuple):
    """What the kernel is specialised for."""

    dtype: Any
    products: tuple[Product, ...]
    eps: tuple[float, float]  # of the two norms
    blocks: int
    consumers: int
    interpret: Any

    @property
    def widest(self) -> int:
        """Inputs of the widest product."""
        return max(product.inputs for product in self.products)

    @property
    def slots(self) -> int:
        """Tiles of a consumer's ring."""
        other = 2 * self.widest + 4 * SCRATCH
        return (MAX_MEMORY // self.consumers - other) // (2 * TILE)


def decode_chain(
    x: jax.Array, attended: jax.Array, weights: ChainWeights, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """See ``api.decode_chain``; ``interpret`` runs the kernel on a CPU, slowly.

    Raises:
        NotImplementedError: the kernel can't run this case here.
    """
    matrices = weights.out[None], weights.up, weights.down[None], weights.next[None]
    dtypes = {x.dtype, *(array.dtype for array in jax.tree.leaves(weights))}
    if len(dtypes) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError("the Mosaic GPU kernel takes either bfloat16 or float16")
    # In the interpreter, where nobody can wait for other blocks, there are none.
    blocks, consumers = (1, 1) if interpret else (hopper_cores(), CONSUMERS)
    norms = weights.norm, weights.next_norm
    shape = _Shape(
        x.dtype,
        _cut(matrices),
        (norms[0].eps, norms[1].eps),
        blocks,
        consumers,
        interpret,
    )
    if shape.slots < 2:
        raise NotImplementedError(f"{shape.widest} inputs leave no memory for the weights")
    mesh = plgpu.Mesh(
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="role",
        kernel_name="decode_chain",
    )

    def body(*refs: Any) -> None:
        run = functools.partial(_kernel, shape, *refs)
        pl.run_scoped(run, collective_axes="role", **_shared_memory(shape))

    outputs = [jax.ShapeDtypeStruct((p.outputs,), x.dtype) for p in shape.products[:-1]]
    outputs.append(jax.ShapeDtypeStruct((shape.products[-1].outputs,), jnp.float32))
    kernel = pl.kernel(
        body,
        outputs,
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        interpret=interpret or None,
    )
    lines = [w.reshape(*w.shape[:2], -1, LINE) for w in matrices]
    counters = jnp.zeros(WAITS + 1, jnp.int32)
    scales = norms[0].scale, norms[1].scale
    _, _, stream, y = kernel(x[0], attended[0], *scales, counters, *lines)
    return stream[None], y[None]


def _cut(matrices: Sequence[jax.Array]) -> tuple[Product, ...]:
    """The products with weights [parts, outputs, inputs].

    Raises:
        NotImplementedError: one can't be cut into tiles.
    """
    products: list[Product] = []
    before = 0
    for parts, outputs, inputs in (w.shape for w in matrices):
        if outputs % ROWS or inputs % LINE:
            raise NotImplementedError(
                f"the Mosaic GPU kernel cuts weights into {ROWS} x {LINE}, not {outputs} x {inputs}"
            )
        products.append(Product(outputs, inputs, parts, before))
        before += products[-1].units
    return tuple(products)


def _shared_memory(shape: _Shape) -> dict[str, Any]:
    """The scratch arrays of a block and the barriers that guard them."""
    consumers, slots = shape.consumers, shape.slots
    ring: Any = plgpu.SMEM((consumers, slots, TILE // LINE, LINE), shape.dtype)
    if shape.interpret:  # it can't copy to a part of an array in another shape
        tiles = [product.tile for product in shape.products]
        ring = [plgpu.SMEM((consumers, slots, *tile), shape.dtype) for tile in tiles]
    return {
        "ring": ring,
        "vector": plgpu.SMEM((consumers, shape.widest), shape.dtype),
        "scratch": plgpu.SMEM((consumers, SCRATCH), jnp.float32),
        "full": plgpu.Barrier(num_barriers=consumers * slots),
        "free": plgpu.Barrier(num_barriers=consumers * slots),
        "passed": plgpu.Barrier(num_arrivals=consumers),
    }


def _kernel(shape: _Shape, x, attended, scale, next_scale, counters, *refs, **scratch) -> None:
    weights, outputs = refs[: len(shape.products)], refs[len(shape.products) :]
    block = types.SimpleNamespace(index=lax.axis_index("block"), **scratch)
    role = lax.axis_index("role")
    tiles = _tiles_before(shape, block)

    @pl.when(role == shape.consumers)
    def _():
        _set_registers(shape, PRODUCER_REGISTERS, "decrease")
        for product, weight, before in zip(shape.products, weights, tiles):
            _produce(shape, block, product, weight, before)
        # Not before the consumers are done with the barriers.
        for consumer, count in enumerate(tiles[-1]):
            for slot in range(shape.slots):
                free = block.free.at[consumer * shape.slots + slot]
                pl.when(count > slot)(functools.partial(plgpu.barrier_wait, free))
        plgpu.barrier_wait(block.passed)
        if not shape.interpret:
            _clear(shape.blocks, counters)

    @pl.when(role < shape.consumers)
    def _():
        _set_registers(shape, CONSUMER_REGISTERS, "increase")
        h, gated, stream, y = outputs
        bring = functools.partial(_bring, shape, block.vector.at[role], block.scratch.at[role])
        meet = functools.partial(_meet, shape, counters)

        def multiply(which: int, out: Any, finish: Callable) -> None:
            product, before = shape.products[which], _pick(role, tiles[which])
            _consume(shape, block, role, product, before, out, finish)

        bring(attended)
        multiply(0, h, lambda rows, out: _rows(shape, x, rows) + out)
        meet(0)
        bring(h, scale, shape.eps[0])
        multiply(1, gated, lambda rows, gate, up: up * gate / (1 + jnp.exp(-gate)))
        meet(1)
        bring(gated)
        multiply(2, stream, lambda rows, out: _rows(shape, h, rows) + out)
        meet(2)
        plgpu.barrier_arrive(block.passed)
        bring(stream, next_scale, shape.eps[1])
        multiply(3, y, lambda rows, out: out)


def _set_registers(shape: _Shape, count: int, action: str) -> None:
    if not shape.interpret:
        plgpu.set_max_registers(count, action=action)  # type: ignore[arg-type]


def _tiles_before(shape: _Shape, block: Any) -> list[list[Any]]:
    """For each product and behind the last one, how many tiles came before for each consumer."""
    tiles = [[jnp.int32(0)] * shape.consumers]
    for product in shape.products:
        counts = (
            product.share(block.index, shape.blocks, consumer, shape.consumers)
            for consumer in range(shape.consumers)
        )
        tiles.append([sum_ + n * product.chunks for sum_, n in zip(tiles[-1], counts)])
    return tiles


def _pick(index: Any, values: Sequence[Any]) -> Any:
    """``values[index]`` of an index that isn't known when the kernel is made."""
    picked = values[0]
    for number, value in enumerate(values[1:], 1):
        picked = jnp.where(index == number, value, picked)
    return picked


def _produce(shape: _Shape, block: Any, product: Product, weight: Any, before: list[Any]) -> None:
    """Fetches the block's tiles of a weight [parts, outputs, lines, LINE]."""
    lines = product.chunk // LINE

    def fetch(i, carry):
        nth, chunk = lax.div(i, product.chunks), lax.rem(i, product.chunks)
        consumer = lax.rem(nth, shape.consumers)
        turn = lax.div(nth, shape.consumers)
        tile = _pick(consumer, before) + turn * product.chunks + chunk
        slot = lax.rem(tile, shape.slots)
        at = consumer * shape.slots + slot

        @pl.when(tile >= shape.slots)
        def _():
            plgpu.barrier_wait(block.free.at[at])

        row = (product.first(block.index, shape.blocks) + nth * shape.blocks) * ROWS
        source = weight.at[:, pl.ds(row, ROWS), pl.ds(chunk * lines, lines)]
        place = _place(shape, block, product, consumer, slot)
        plgpu.copy_gmem_to_smem(source, place, block.full.at[at])

    lax.fori_loop(0, product.share(block.index, shape.blocks) * product.chunks, fetch, None)


def _place(shape: _Shape, block: Any, product: Product, consumer: Any, slot: Any) -> Any:
    """The memory of a tile."""
    if shape.interpret:
        return block.ring[shape.products.index(product)].at[consumer, slot]
    lines = product.parts * ROWS * (product.chunk // LINE)
    return block.ring.at[consumer, slot, pl.ds(0, lines)].reshape(product.tile)


def _consume(
    shape: _Shape,
    block: Any,
    role: Any,
    product: Product,
    before: Any,
    out: Any,
    finish: Callable,
) -> None:
    """Multiplies the consumer's units of a product, and stores ``finish(rows, *sums)``."""
    vector = block.vector.at[role]
    zero = jnp.zeros((ROWS,), jnp.float32)
    zero = zero if shape.interpret else plgpu.layout_cast(zero, BY_ROW)

    def unit(i, carry):
        def add(chunk, sums):
            slot = lax.rem(before + i * product.chunks + chunk, shape.slots)
            at = role * shape.slots + slot
            tile = _place(shape, block, product, role, slot)
            inputs = vector.at[pl.ds(chunk * product.chunk, product.chunk)]
            plgpu.barrier_wait(block.full.at[at])
            sums = tuple(s + _dot(shape, tile.at[part], inputs) for part, s in enumerate(sums))
            plgpu.barrier_arrive(block.free.at[at])
            return sums

        sums = lax.fori_loop(0, product.chunks, add, (zero,) * product.parts)
        nth = i * shape.consumers + role
        row = (product.first(block.index, shape.blocks) + nth * shape.blocks) * ROWS
        rows = pl.ds(row, ROWS)
        out[rows] = finish(rows, *sums).astype(out.dtype)

    count = product.share(block.index, shape.blocks, role, shape.consumers)
    lax.fori_loop(0, count, unit, None)


# --- what Pallas has no words for -----------------------------------------------------------------


def _dot(shape: _Shape, tile: Any, inputs: Any) -> jax.Array:
    """A tile [ROWS, lines, LINE] times a vector, float32 [ROWS]."""
    if shape.interpret:
        rows = tile[...].reshape(ROWS, -1).astype(jnp.float32)
        return jnp.sum(rows * inputs[...].astype(jnp.float32), 1)
    by_tile: Any = BY_TILE.to_mgpu()

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=BY_ROW),
    )
    def dot(ctx, tile, inputs):
        f32 = mgpu.utils.ir.F32Type.get()
        load = functools.partial(mgpu.FragmentedArray.load_untiled, optimized=False)
        rows = load(mgpu.utils.memref_fold(tile, 1, 2), layout=by_tile).astype(f32)
        inputs = load(inputs, layout=by_tile.reduce((0,))).astype(f32)
        return (rows * inputs.broadcast_in_dim(rows.shape, (1,), by_tile)).reduce("add", (1,))

    return dot(tile, inputs)


def _bring(
    shape: _Shape, own: Any, scratch: Any, vector: Any, scale: Any = None, eps: float = 0.0
) -> None:
    """Copies a vector, which other blocks may have written, to the consumer's shared memory,
    normalized if there is a scale."""
    size = vector.shape[0]
    refs = (vector, own.at[pl.ds(0, size)], scratch)
    if shape.interpret:
        x = vector[...]
        if scale is not None:
            h = x.astype(jnp.float32)
            h = h * lax.rsqrt(jnp.mean(h * h) + eps)
            x = (h.astype(scale.dtype) * scale[...]).astype(x.dtype)
        refs[1][...] = x
        return
    load = functools.partial(
        mgpu.FragmentedArray.load_strided,
        vec_size=next(n for n in (8, 4, 2) if size % (128 * n) == 0),
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 if scale is None else 4))
    def bring(ctx, vector, own, scratch, scale=None):
        f32, constant = mgpu.utils.ir.F32Type.get(), mgpu.utils.c
        x = load(vector)
        if scale is not None:
            scale, h = load(scale), x.astype(f32)
            mean = (h * h).reduce("add", (0,), scratch) * constant(1 / size, f32)
            factor = (mean + constant(eps, f32)).rsqrt(approx=True)
            h = (h * factor.broadcast((size,))).astype(scale.mlir_dtype).astype(f32)
            x = (h * scale.astype(f32)).astype(x.mlir_dtype)
        x.store_untiled(own, optimized=False)
        mgpu.utils.warpgroup_barrier()

    bring(*refs, *(() if scale is None else (scale,)))


def _rows(shape: _Shape, vector: Any, rows: Any) -> jax.Array:
    """The elements of a vector that stand where a tile's rows do, float32 [ROWS]."""
    if shape.interpret:
        return vector[rows].astype(jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=BY_ROW),
    )
    def load(ctx, vector):
        layout: Any = BY_ROW.to_mgpu()
        own = mgpu.FragmentedArray.load_untiled(vector, layout=layout, optimized=False)
        return own.astype(mgpu.utils.ir.F32Type.get())

    return load(vector.at[rows])


def _meet(shape: _Shape, counters: Any, which: int) -> None:
    """Waits until all consumers of all blocks are here; then all see what the others stored."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def meet(ctx, counters):
        counter = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(counters, which))
        semaphore = mgpu.utils.SemaphoreRef(counter)
        mgpu.utils.warpgroup_barrier()
        semaphore.signal(1, memory_scope="gpu")
        everybody = shape.blocks * shape.consumers
        semaphore.wait(everybody, decrement=False, memory_scope="gpu")

    meet(counters)


def _clear(blocks: int, counters: Any) -> None:
    """Sets the counters to zero if this is the last block that needs them; the last counter, of the
    blocks that have come here, starts again by itself."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def clear(ctx, counters):
        last = 4 * WAITS
        code = (
            "{ .reg .u32 before; .reg .pred last;"
            f" atom.acq_rel.gpu.global.inc.u32 before, [$1+{last}], {blocks - 1};"
            f" setp.eq.u32 last, before, {blocks - 1};"
        )
        for offset in range(0, last, 4):
            code += f" @last st.relaxed.gpu.global.u32 [$1+{offset}], 0;"
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        pointer = mgpu.utils.memref_ptr(counters)
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            mgpu.utils.llvm.inline_asm(
                i32, [pointer], code + " mov.u32 $0, before; }", "=r,l", has_side_effects=True
            )

    clear(counters)
