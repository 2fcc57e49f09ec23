"""The op for NVIDIA GPUs, in Pallas with the Triton backend.

Two grouped products. The first gathers the tokens of an expert, multiplies them with its gate and
up parts and applies the activation; the second multiplies what comes out with its down part and the
routing weights. Both multiply tiles of an expert's weight with tiles of its pairs (a token and one
of its experts; see ``triton_routing``), so that of few tokens' experts every weight is read once,
by as many programs as it has tiles, and many tokens fill the tensor cores.

The products of a token's experts are left to whoever reads the result as terms: a sum of its own
would read and write them once more.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.expert_ffn.activations import GATED
from pallas_kernels.expert_ffn.triton_routing import find, route
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.triton_product import tile_products

MIN_ROWS = 16
"""Rows of the matrix unit's smallest tile."""
MANY_ROWS = 128
"""Pairs per expert from which the tensor cores, not the memory, are what programs wait for."""
MIN_PROGRAMS = 96
"""Fewer than this leave too many multiprocessors idle."""
MAX_SPLITS = 8
"""More would cost whoever sums them up too much."""
SHARED_BYTES = 200 << 10
"""Shared memory for the loads in flight of a program."""
SLOTS_TOGETHER = 8
"""Slots that take turns on each block of a weight, so that the L2 cache serves all but the first
tile of a group, and on a range of blocks, so that it keeps their pairs."""


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: pairs in a tile.
        up, down: rows of the up part's two matrices, and of the down part's, per program.
        inputs: columns per step of a program's loop.
        splits: programs that share the down part's columns; each gives terms of its own.
        warps, stages: of the compiler, warps per program and loads in flight.
    """

    rows: int
    up: int
    down: int
    inputs: int
    splits: int
    warps: int
    stages: int


def expert_ffn(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    activation: str = "silu",
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.expert_ffn``; it gives ``config.splits`` * top_k terms. ``interpret`` runs the
    kernels on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernels need a GPU")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Triton kernels have no {x.dtype} version")
    if up.dtype != x.dtype or down.dtype != x.dtype:
        raise NotImplementedError(f"the Triton kernels don't mix {x.dtype} with other weights")
    if activation == "gelu":
        raise NotImplementedError("Pallas' Triton backend has no error function")
    config = config or _chosen(x, experts, up)
    (tokens, top_k), (count, _, size, hidden) = experts.shape, up.shape
    if config.splits > 1 and size % (config.inputs * config.splits):
        raise NotImplementedError(f"{size} columns can't be split as in {config}")
    routing, slots = route(experts, count, config.rows, interpret)
    call = functools.partial(_call, config=config, slots=slots, interpret=interpret)
    h = call(
        functools.partial(_up_kernel, activation=activation, top_k=top_k),
        _Product(count, size, hidden, config.up, 1),
        jax.ShapeDtypeStruct((tokens * top_k, size), x.dtype),
    )(routing, x, up, up_bias)
    return call(
        functools.partial(_down_kernel, top_k=top_k),
        _Product(count, hidden, size, config.down, config.splits),
        jax.ShapeDtypeStruct((config.splits * top_k, tokens, hidden), x.dtype),
    )(routing, weights.reshape(-1), h, down[:, None], down_bias)


class _Product(NamedTuple):
    """The shape of a product, and how it is cut into programs.

    Attributes:
        experts, outputs, inputs: their number, and the rows and columns of their matrices.
        block: rows per program.
        splits: programs that share the columns.
    """

    experts: int
    outputs: int
    inputs: int
    block: int
    splits: int

    @property
    def blocks(self) -> int:
        return -(-self.outputs // self.block)


def _call(
    kernel: Any, product: _Product, out_shape: Any, *, config: Config, slots: int, interpret: bool
) -> Any:
    return pl.pallas_call(
        functools.partial(kernel, product=product, config=config, slots=slots),
        name=f"expert{kernel.func.__name__.removesuffix('_kernel')}",
        grid=(slots * product.blocks, product.splits),
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
    )


def _up_kernel(
    routing, x_ref, w_ref, bias_ref, h_ref, *, product, config, slots, activation, top_k
):
    slot, block = _place(slots, product)
    work = find(routing, slot, config.rows, product.experts)
    output = block * product.block + jnp.arange(product.block)

    def tile(i):
        pair, exists = work.pairs(i)
        token = lax.div(pair, top_k)
        steps = -(-product.inputs // config.inputs)
        sums = tile_products(
            x_ref, token, exists, w_ref, work.group, output, 0, steps, config.inputs
        )
        if bias_ref is not None:
            sums = [
                total + _bias(bias_ref, (work.group, part), output)
                for part, total in enumerate(sums)
            ]
        _store(h_ref, (pair,), output, GATED[activation](*sums), exists)

    # What no expert here makes, nobody reads.
    here = work.group < product.experts
    work._replace(works=here & work.works).for_each_tile(tile)


def _down_kernel(
    routing, weights_ref, h_ref, w_ref, bias_ref, out_ref, *, product, config, slots, top_k
):
    slot, block = _place(slots, product)
    split = pl.program_id(1)
    work = find(routing, slot, config.rows, product.experts)
    here = work.group < product.experts
    expert = jnp.minimum(work.group, product.experts - 1)
    output = block * product.block + jnp.arange(product.block)
    share = product.inputs // product.splits
    # Experts elsewhere add zero. (Pallas-Triton lowers a choice between literals to one bit.)
    steps = here.astype(jnp.int32) * -(-share // config.inputs)

    def tile(i):
        pair, exists = work.pairs(i)
        start = split * share
        (y,) = tile_products(
            h_ref, pair, exists, w_ref, expert, output, start, steps, config.inputs
        )
        if bias_ref is not None:
            y = y + jnp.where(split == 0, _bias(bias_ref, (expert,), output), 0.0)
        weight = plt.load(weights_ref.at[pair], mask=exists & here, other=0)
        term = split * top_k + lax.rem(pair, top_k)
        _store(out_ref, (term, lax.div(pair, top_k)), output, y * weight[None, :], exists)

    work.for_each_tile(tile)


def _place(slots: int, product: _Product) -> tuple[Any, Any]:
    """A program's slot and block of outputs; see SLOTS_TOGETHER."""
    program = pl.program_id(0)
    turn = SLOTS_TOGETHER * product.blocks
    first = lax.div(program, turn) * SLOTS_TOGETHER
    together = jnp.minimum(slots - first, SLOTS_TOGETHER)
    within = lax.rem(program, turn)
    return first + lax.rem(within, together), lax.div(within, together)


def _bias(bias_ref: Any, place: tuple[Any, ...], output: jax.Array) -> jax.Array:
    """A bias as float32 [outputs, 1]."""
    index = (*(jnp.full(output.shape, i) for i in place), output)
    mask = output < bias_ref.shape[-1]
    return plt.load(bias_ref.at[index], mask=mask, other=0).astype(jnp.float32)[:, None]


def _store(
    ref: Any, place: tuple[jax.Array, ...], output: jax.Array, values: jax.Array, exists: jax.Array
) -> None:
    """Stores values [outputs, rows] to ref[*place, output], of those rows that exist."""
    shape = values.T.shape
    column = jnp.broadcast_to(output[None, :], shape)
    index = (*(jnp.broadcast_to(one[:, None], shape) for one in place), column)
    mask = jnp.broadcast_to(exists[:, None], shape) & (column < ref.shape[-1])
    plt.store(ref.at[index], values.T.astype(ref.dtype), mask=mask)


# --- configurations -------------------------------------------------------------------------------


def candidates(
    x: jax.Array, experts: jax.Array, up: jax.Array, **arguments: Any
) -> Iterable[Config]:
    """Configurations worth timing for these arguments of the op."""
    default = _default(x, experts, up)
    all_rows = (rows for rows in (16, 32, 64, 128) if default.rows <= 2 * rows <= 4 * default.rows)
    choices = itertools.product(all_rows, (32, 64, 128), (1, 2), (64, 128), (4, 8), (3, 4))
    for rows, block, wider, inputs, warps, stages in choices:
        config = Config(rows, block, wider * block, inputs, default.splits, warps, stages)
        if _fits(config, x.dtype.itemsize):
            yield config


def _fits(config: Config, itemsize: int) -> bool:
    """Whether a program's loads fit into shared memory, and its sums into its registers."""
    widest = max(2 * config.up, config.down)
    loads = (widest + config.rows) * config.inputs * itemsize * config.stages
    sums = widest * config.rows // (32 * config.warps)
    return 40 << 10 <= loads <= SHARED_BYTES and sums <= 128


def tuning_key(x: jax.Array, experts: jax.Array, up: jax.Array, **arguments: Any) -> str:
    """What a tuned configuration depends on."""
    count, _, size, hidden = up.shape
    tokens, top_k = power_of_two(x.shape[0]), experts.shape[1]
    return f"{tokens} tokens x {top_k} of {count} {size}x{hidden} {x.dtype}"


def _chosen(x: jax.Array, experts: jax.Array, up: jax.Array) -> Config:
    tuned = tuning.lookup("expert_ffn", "triton", tuning_key(x, experts, up))
    return Config(**tuned) if tuned is not None else _default(x, experts, up)


def _default(x: jax.Array, experts: jax.Array, up: jax.Array) -> Config:
    """By reasoning, and by what is best for fused_linear; not measured.

    A tile holds half as many pairs again as an expert has on average, so that most experts need
    one tile, but no more than 64 while the memory is the limit: their weights' second reading is
    from the L2 cache, and wider tiles would mostly be empty.
    """
    pairs, (count, _, size, hidden) = experts.size, up.shape
    dividing = math.gcd(size, hidden)
    inputs = next((block for block in (128, 64, 32) if dividing % block == 0), 32)
    if x.dtype == jnp.float32:
        return Config(min(32, _usual_rows(pairs, count)), 32, 32, 32, 1, 4, 2)
    if pairs >= MANY_ROWS * count:
        return Config(MANY_ROWS, 128, 256, min(inputs, 64), 1, 8, 3)
    busy, splits, block = min(pairs, count), 1, 64
    while block > MIN_ROWS and busy * -(-size // block) < MIN_PROGRAMS:
        block //= 2
    while (
        splits < MAX_SPLITS
        and busy * -(-hidden // 64) * splits < MIN_PROGRAMS
        and size % (2 * splits * inputs) == 0
    ):
        splits *= 2
    return Config(_usual_rows(pairs, count), block, 64, inputs, splits, 4, 3)


def _usual_rows(pairs: int, count: int) -> int:
    """Rows for half as many pairs again as an expert has on average, 64 at most."""
    return min(64, max(MIN_ROWS, power_of_two(-(-3 * pairs // (2 * count)))))
