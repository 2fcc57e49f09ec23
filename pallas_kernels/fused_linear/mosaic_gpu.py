"""The op for more than 64 rows on Hopper GPUs, in Pallas with the Mosaic GPU backend.

A block has a producer, a warpgroup that lets the copy engine fetch tiles of x and of the weight
into a ring of shared memory, and two consumers, warpgroups that multiply them on the tensor cores.
A consumer has the sums of half of the tile's rows in registers; those of a gated product are the
gate's and, beside them, what it gates, so that the product of both is all that is written. Blocks
are persistent: the producer fetches the next tile's operands while the consumers finish the last
one, and its result is stored while they multiply.

Blocks may come in pairs with the same columns and neighbouring rows, which fetch half of the
weight's tiles each, for both: most of the traffic between the L2 cache and the multiprocessors is
the weight's.

Where a few hundred rows make fewer tiles than there are multiprocessors, the sums may be split
along the inputs, for whoever reads the result to add up (``partial``).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import hopper_cores

MIN_ROWS = 65
"""With fewer, the time goes into reading the weight, and the Triton kernel is made for that."""
INTERPRETED_CORES = 2
CONSUMERS = 2
TILE_ROWS = (128, 256)  # each consumer's half is one wgmma of 64 rows, or two
MAX_WIDTH = 256  # columns of one wgmma
MAX_SUMS = 128  # of each thread of a consumer, in as many registers
INPUTS = 64  # columns of a tile of operands: a swizzled row
CHUNK = 8  # rows after which the pattern of swizzled memory repeats
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of each thread
MAX_MEMORY = 226 << 10  # bytes of a block's arrays; there is 1 KiB more, for its barriers
MAX_RESULT_MEMORY = 28 << 10  # bytes of a consumer's results on their way out
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # The barriers that this leaves out guard memory that a thread reads and writes itself. In our
    # kernel commit_smem and wait_smem_to_gmem, which are barriers, stand between.
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=0,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: of x in a tile, 128 or 256.
        outputs: columns of the result in a tile.
        stages: tiles of operands in shared memory.
        band: row tiles (pairs of them if ``pair`` is 2) that take turns before the next column of
            tiles begins, so that what all blocks work on at a time stays in the L2 cache.
        pair: 2 if two blocks share the weight's tiles, or 1.
        splits: blocks that share the inputs; more than one only where ``partial`` is asked for.
    """

    rows: int
    outputs: int
    stages: int
    band: int
    pair: int
    splits: int = 1


class _Shape(NamedTuple):
    """What the kernel is specialised for."""

    dtype: Any
    rows: int  # of x
    inputs: int
    outputs: int  # columns of the result
    parts: int  # 2 if gated: products whose columns stand side by side in the sums
    cores: int
    config: Config
    interpret: Any

    @property
    def width(self) -> int:
        """Columns of a tile of sums."""
        return self.parts * self.config.outputs

    @property
    def consumer_rows(self) -> int:
        return self.config.rows // CONSUMERS

    @property
    def steps(self) -> int:
        """Tiles of operands to a tile of sums."""
        return self.inputs // (INPUTS * self.config.splits)

    @property
    def row_tiles(self) -> int:
        """What the blocks of a pair share is one."""
        return -(-self.rows // (self.config.rows * self.config.pair))

    @property
    def split_tiles(self) -> int:
        """Tiles of one of the splits."""
        return self.row_tiles * (self.outputs // self.config.outputs)

    @property
    def tiles(self) -> int:
        return self.split_tiles * self.config.splits

    @property
    def chunk(self) -> int:
        """Columns of a result that are stored at once: a swizzled row."""
        return next(size for size in (64, 32, 16) if self.config.outputs % size == 0)

    @property
    def result_slots(self) -> int:
        """Chunks of a consumer's results in shared memory; divides those of a tile, so that each
        has a slot of its own."""
        chunks = self.config.outputs // self.chunk
        fitting = MAX_RESULT_MEMORY // (2 * self.consumer_rows * self.chunk)
        return next(slots for slots in range(min(chunks, fitting), 0, -1) if chunks % slots == 0)

    @property
    def memory(self) -> int:
        """Bytes of shared memory, but for the barriers."""
        operands = self.config.stages * (self.config.rows + self.width) * INPUTS
        results = CONSUMERS * self.result_slots * self.consumer_rows * self.chunk
        return 2 * (operands + results)


def fused_linear(
    x: jax.Array,
    w: jax.Array,
    *,
    silu_gated: bool = False,
    partial: bool = False,
    out_dtype: jnp.dtype | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See ``api.fused_linear``.

    Args:
        config: None takes the tuned one.
        interpret: True or ``InterpretGPUParams`` to run on a CPU, slowly. The latter must let reads
            go out of bounds unless ``x`` consists of whole tiles.

    Raises:
        NotImplementedError: the kernel can't run this case here.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise NotImplementedError("the Mosaic GPU kernel takes bfloat16 and float16 only")
    if out_dtype not in (None, x.dtype):
        raise NotImplementedError(f"the Mosaic GPU kernel writes {x.dtype}, not {out_dtype}")
    if x.shape[0] < MIN_ROWS:
        raise NotImplementedError(f"the Mosaic GPU kernel is not made for {x.shape[0]} rows")
    interpret = _interpreter() if interpret is True else interpret
    cores = INTERPRETED_CORES if interpret else hopper_cores()
    config = config or _chosen(x, w, silu_gated=silu_gated)
    shape = _shape(x, w, silu_gated, cores, config, interpret)
    if (reason := _misfit(shape)) is not None:
        raise NotImplementedError(f"the Mosaic GPU kernel doesn't tile {w.shape}: {reason}")
    if config.splits > 1 and not partial:
        raise NotImplementedError("only partial sums can be split")
    cluster: dict[str, Any] = {}
    if config.pair > 1:
        cluster = {"cluster": (config.pair,), "cluster_names": ("member",)}
    mesh = plgpu.Mesh(
        grid=(cores // config.pair,),
        grid_names=("block",),
        **cluster,
        num_threads=CONSUMERS + 1,
        thread_name="role",
        kernel_name="fused_linear",
    )

    def body(*refs: Any) -> None:
        run = functools.partial(_kernel, shape, *refs)
        pl.run_scoped(run, collective_axes="role", **_shared_memory(shape))

    rows = shape.rows
    if interpret:  # JAX 0.10 drops what the copy engine would clip.
        rows = shape.row_tiles * config.pair * config.rows
    kernel = pl.kernel(
        body,
        jax.ShapeDtypeStruct((config.splits, rows, shape.outputs), x.dtype),
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        interpret=interpret or None,
    )
    y = kernel(x, w.reshape(shape.parts, shape.outputs, shape.inputs))[:, : shape.rows]
    return y if partial else y[0]


def _shape(
    x: jax.Array, w: jax.Array, silu_gated: bool, cores: int, config: Config, interpret: Any = False
) -> _Shape:
    return _Shape(
        dtype=x.dtype,
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=w.shape[-2],
        parts=2 if silu_gated else 1,
        cores=cores,
        config=config,
        interpret=interpret,
    )


def _interpreter() -> Any:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public in 0.11

    return InterpretGPUParams(out_of_bounds_reads="uninitialized")


def _misfit(shape: _Shape) -> str | None:
    """Why the kernel can't be cut like that; None if it can."""
    config = shape.config
    if shape.inputs % (INPUTS * config.splits):
        return f"{shape.inputs} columns are no multiple of {INPUTS * config.splits}"
    if config.outputs % 16 or shape.outputs % config.outputs:
        return f"{shape.outputs} outputs are not cut by {config.outputs}"
    if config.rows not in TILE_ROWS or shape.width > MAX_WIDTH:
        return f"a tile of {config.rows} x {shape.width} sums is none for the tensor cores"
    if shape.consumer_rows * shape.width > MAX_SUMS * 128:
        return f"the registers don't hold {config.rows} x {shape.width} sums"
    # A stage is given back when the next one's products are under way.
    if config.stages < 2 or shape.memory > MAX_MEMORY:
        return f"{config.stages} stages need {shape.memory} bytes of shared memory"
    return None


def _shared_memory(shape: _Shape) -> dict[str, Any]:
    """The scratch arrays of a block and the barriers that guard them."""
    config, swizzled = shape.config, functools.partial(_swizzled_smem, shape)
    slots = config.stages
    free: Any = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots)
    if config.pair > 1:
        # A block's copies write the other one's memory too.
        free = plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=CONSUMERS, num_barriers=slots
        )
    return {
        "x_smem": swizzled((slots,), (config.rows, INPUTS)),
        "w_smem": swizzled((slots,), (shape.width, INPUTS), (shape.parts, config.outputs, INPUTS)),
        "result_smem": swizzled(
            (CONSUMERS, shape.result_slots), (shape.consumer_rows, shape.chunk)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "free": free,
    }


def _swizzled_smem(
    shape: _Shape, slots: tuple[int, ...], matrix: tuple[int, int], copied: tuple[int, ...] = ()
) -> Any:
    """Shared memory of matrices whose rows are swizzled ones: a view for the tensor cores or
    registers, and one of shape ``copied`` for the copy engine, which starts and ends at any row
    only if it needn't cut the rows into tiles. The tiles lie one behind the other, so it needn't.
    """
    columns = matrix[1]
    swizzle = plgpu.SwizzleTransform(2 * columns)
    tiling = plgpu.TilingTransform((CHUNK, columns))
    copied = copied or matrix
    if shape.interpret:
        return plgpu.SMEM((*slots, *copied), shape.dtype)
    return plgpu.RefUnion(
        plgpu.SMEM((*slots, *matrix), shape.dtype, transforms=(tiling, swizzle)),
        plgpu.SMEM((*slots, *copied), shape.dtype, transforms=(swizzle,)),
    )


def _views(shape: _Shape, smem: Any) -> tuple[Any, Any]:
    """What ``_swizzled_smem`` is to the tensor cores, and to the copy engine."""
    return (smem, smem) if shape.interpret else tuple(smem)


def _kernel(shape: _Shape, x, w, out, **scratch) -> None:
    block = types.SimpleNamespace(**scratch)
    role = lax.axis_index("role")

    @pl.when(role == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        count = _for_each_tile(shape, functools.partial(_produce, shape, block, x, w))
        # Not before the consumers, of both blocks, are done with the barriers.
        for slot in range(shape.config.stages):
            pl.when(count > slot)(functools.partial(plgpu.barrier_wait, block.free.at[slot]))

    @pl.when(role < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _for_each_tile(shape, functools.partial(_consume, shape, block, out, role))
        plgpu.wait_smem_to_gmem(0)


def _for_each_tile(shape: _Shape, step: Callable) -> Any:
    """Runs ``step(split, row, column, count)`` for the tiles of this block, where ``count`` tiles
    of operands came before; returns their number.

    The blocks take turns over the tiles. In a band of rows, the columns of tiles follow one
    another.
    """
    config = shape.config
    block, blocks = lax.axis_index("block"), shape.cores // config.pair
    member = lax.axis_index("member") if config.pair > 1 else 0
    of_band = config.band * (shape.outputs // config.outputs)

    def run(nth, _):
        tile = block + nth * blocks
        split, tile = lax.div(tile, shape.split_tiles), lax.rem(tile, shape.split_tiles)
        band, rest = lax.div(tile, of_band), lax.rem(tile, of_band)
        first = band * config.band
        height = jnp.minimum(shape.row_tiles - first, config.band)
        row = (first + lax.rem(rest, height)) * config.pair + member
        column = lax.div(rest, height)
        step(split, row * config.rows, column * config.outputs, nth * shape.steps)

    mine = lax.div(shape.tiles - block + blocks - 1, blocks)
    lax.fori_loop(0, mine, run, None)
    return mine * shape.steps


def _produce(shape: _Shape, block, x, w, split, row, column, count) -> None:
    """Fetches a tile's operands."""
    config = shape.config
    (_, x_smem), (_, w_smem) = _views(shape, block.x_smem), _views(shape, block.w_smem)
    shared = ("member",) if config.pair > 1 else None

    def fetch(i, carry):
        slot = lax.rem(count + i, config.stages)

        @pl.when(count + i >= config.stages)
        def _():
            plgpu.barrier_wait(block.free.at[slot])

        full = block.full.at[slot]
        inputs = pl.ds((split * shape.steps + i) * INPUTS, INPUTS)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, config.rows), inputs], x_smem.at[slot], full)
        outputs = w.at[:, pl.ds(column, config.outputs), inputs]
        plgpu.copy_gmem_to_smem(outputs, w_smem.at[slot], full, collective_axes=shared)

    lax.fori_loop(0, shape.steps, fetch, None)


def _consume(shape: _Shape, block, out, role, split, row, column, count) -> None:
    """Computes half of a tile's rows and starts storing them."""
    own = pl.ds(role * shape.consumer_rows, shape.consumer_rows)
    (x_smem, _), (w_smem, _) = _views(shape, block.x_smem), _views(shape, block.w_smem)

    def slot(i):
        return lax.rem(count + i, shape.config.stages)

    def release(i) -> None:
        plgpu.barrier_arrive(block.free.at[slot(i)])

    def operands(i):
        plgpu.barrier_wait(block.full.at[slot(i)])
        return x_smem.at[slot(i), own], w_smem.at[slot(i)]

    multiply = _multiply_interpreted if shape.interpret else _multiply
    sums = multiply(shape, operands, release)
    _store(shape, block, sums, out.at[split], role, row + role * shape.consumer_rows, column)


def _multiply(shape: _Shape, operands: Callable, release: Callable) -> jax.Array:
    """The sums [consumer_rows, width]; ``operands(i)`` waits for the i-th tiles, and ``release(i)``
    gives them back."""

    def run(sums):
        def multiply(i) -> None:
            x, w = operands(i)
            plgpu.wgmma(sums, x, plgpu.transpose_ref(w, (1, 0)))

        def step(i, _):
            multiply(i)
            plgpu.wgmma_wait(1)
            release(i - 1)

        multiply(0)
        lax.fori_loop(1, shape.steps, step, None)
        result = sums[...]
        release(shape.steps - 1)
        return result

    return pl.run_scoped(run, plgpu.ACC((shape.consumer_rows, shape.width), jnp.float32))


def _multiply_interpreted(shape: _Shape, operands: Callable, release: Callable) -> jax.Array:
    """Like ``_multiply``, for the interpreter, which has no wgmma with a transposed operand."""

    def step(i, sums):
        x, w = (ref[...] for ref in operands(i))
        w = w.reshape(shape.width, INPUTS)
        sums += jnp.dot(x, w.T, preferred_element_type=jnp.float32)
        # Unlike a wgmma's, these reads aren't done before the copy engine writes there again.
        plgpu.commit_smem()
        release(i)
        return sums

    sums = jnp.zeros((shape.consumer_rows, shape.width), jnp.float32)
    return lax.fori_loop(0, shape.steps, step, sums)


def _store(shape: _Shape, block, sums, out, role, row, column) -> None:
    """Starts copies of the results to ``out``, where the copy engine drops rows behind the end."""
    registers, copied = _views(shape, block.result_smem)
    slots, size = shape.result_slots, shape.chunk

    for i, first in enumerate(range(0, shape.config.outputs, size)):
        y = sums[:, first : first + size]
        if shape.parts == 2:
            second = shape.config.outputs + first
            y = _silu(y) * sums[:, second : second + size]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        registers[role, i % slots] = y.astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            copied.at[role, i % slots],
            out.at[pl.ds(row, shape.consumer_rows), pl.ds(column + first, size)],
        )


def _silu(x: jax.Array) -> jax.Array:
    # The square of a reciprocal root: there is no fast division.
    root = lax.rsqrt(1 + jnp.exp(-x))
    return x * root * root


# --- configurations -------------------------------------------------------------------------------

MAX_STAGES = 6
BAND_ROWS = (1024, 2048, 4096)
SPLITS = (2, 3, 4, 6, 8)
WORTH_TIMING = 1.3
"""How many times as long as the best a candidate may take, by ``_estimate``."""


def candidates(x: jax.Array, w: jax.Array, **options: Any) -> Iterable[Config]:
    """Configurations worth timing for these arguments."""
    shapes = _tilings(x, w, **options)
    limit = WORTH_TIMING * min(map(_estimate, shapes), default=0)
    for shape in shapes:
        if _estimate(shape) <= limit:
            rows, stages = shape.config.rows, shape.config.stages
            for pair in (1, 2) if x.shape[0] > rows else (1,):
                tiles = -(-x.shape[0] // (rows * pair))
                bands = {min(tiles, band // (rows * pair)) for band in BAND_ROWS}
                for band in sorted(bands):
                    for fewer in (0, 1):
                        yield shape.config._replace(stages=stages - fewer, band=band, pair=pair)


def tuning_key(x: jax.Array, w: jax.Array, **options: Any) -> str:
    """What a tuned configuration depends on."""
    kind = "gated" if options.get("silu_gated") else "plain"
    return f"{power_of_two(x.shape[0])}x{w.shape[-2]}x{x.shape[1]} {kind}"


def _chosen(x: jax.Array, w: jax.Array, **options: Any) -> Config:
    tuned = tuning.lookup("fused_linear", "mosaic_gpu", tuning_key(x, w, **options))
    if tuned is None:
        raise NotImplementedError("cuBLAS may be faster; the table holds the cases where it isn't")
    return Config(**tuned)


def guess(x: jax.Array, w: jax.Array, **options: Any) -> Config:
    """What is fast by ``_estimate``."""
    shapes = _tilings(x, w, **options)
    if not shapes:
        raise NotImplementedError(f"the Mosaic GPU kernel has no tiles for {w.shape}")
    return min(shapes, key=_estimate).config


def _tilings(x: jax.Array, w: jax.Array, **options: Any) -> list[_Shape]:
    """The ways to cut the work into tiles, with as many stages as fit."""
    gated = options.get("silu_gated", False)
    shapes = []
    for rows in TILE_ROWS:
        for outputs in range(32, MAX_WIDTH + 1, 16):
            configs = (
                Config(rows, outputs, stages, BAND_ROWS[1] // rows, pair=1)
                for stages in range(MAX_STAGES, 1, -1)
            )
            cuts = (_shape(x, w, gated, _cores(), config) for config in configs)
            shapes += [shape for shape in cuts if _misfit(shape) is None][:1]
    if options.get("partial"):
        shapes += [cut for shape in shapes for cut in _splits(shape)]
    return shapes


def _splits(shape: _Shape) -> list[_Shape]:
    """The shape with its inputs split, while that gives more blocks something to do."""
    cuts = [shape._replace(config=shape.config._replace(splits=n)) for n in SPLITS]
    return [cut for cut in cuts if cut.tiles <= cut.cores and _misfit(cut) is None]


def _cores() -> int:
    """Multiprocessors to plan for, also where there is no GPU."""
    try:
        return hopper_cores()
    except NotImplementedError:
        return INTERPRETED_CORES


def _estimate(shape: _Shape) -> float:
    """About how many cycles the product takes, by what the tensor cores do and what reaches a
    multiprocessor in a cycle; a tile begins and ends with some thousand more."""
    rows, width = shape.config.rows, shape.width
    step = max(rows * width / 32, (rows + width) * 3)
    return -(-shape.tiles // shape.cores) * (shape.steps * step + 3000)
