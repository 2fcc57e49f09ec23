"""The op for up to 64 rows on NVIDIA GPUs, in Pallas with the Triton backend: one kernel.

A router's weight is small: what costs time is launching kernels, and waiting for memory. So many
programs share the product, each with some experts and some of their columns. They leave parts of
the logits in device memory, and the last program of a block of rows to arrive adds them up, always
in the same order, and chooses. Arrivals are counted as in ``paged_attention/triton_decode.py``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.route_experts.reference import NO_WEIGHT, SCORES
from pallas_kernels.triton_product import tile_products

BLOCK_ROWS = 16
"""Rows of the matrix unit's smallest tile; each block of so many has a program that chooses."""
MAX_ROWS = 64
"""With more, launches are a smaller part of what XLA's kernels take; not measured."""
MAX_SPLITS = 16
"""More would cost the last program too much."""


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
        experts: per program.
        inputs: columns per step of its loop.
        splits: programs that share the columns.
        warps, stages: of the compiler, warps per program and loads in flight.
    """

    experts: int
    inputs: int
    splits: int
    warps: int
    stages: int


class _Choice(NamedTuple):
    """How experts are chosen, see ``api.route_experts``."""

    top_k: int
    scores: str
    normalize: bool
    scale: float


def route_experts(
    x: jax.Array,
    w: jax.Array,
    *,
    top_k: int,
    scores: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    bias: jax.Array | None = None,
    correction: jax.Array | None = None,
    is_token: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.route_experts``; ``interpret`` runs the kernel on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or w.dtype != x.dtype:
        raise NotImplementedError(f"the Triton kernel doesn't multiply {x.dtype} by {w.dtype}")
    rows, count = x.shape[0], w.shape[0]
    if rows > MAX_ROWS:
        raise NotImplementedError(f"the Triton kernel is not made for {rows} rows")
    if groups > 1:
        raise NotImplementedError("the Triton kernel knows no groups of experts")
    config = config or _chosen(x, w)
    kernel = functools.partial(
        _kernel,
        choice=_Choice(top_k, scores, normalize, scale),
        config=config,
        parallel=not interpret,
    )
    # For all blocks that there could be: a single zero might become a scalar that others read too.
    arrivals = jnp.zeros(MAX_ROWS // BLOCK_ROWS, jnp.int32)
    experts, weights, _ = pl.pallas_call(
        kernel,
        name="route_experts",
        grid=(pl.cdiv(rows, BLOCK_ROWS), pl.cdiv(count, config.experts), config.splits),
        out_shape=(
            jax.ShapeDtypeStruct((rows, top_k), jnp.int32),
            jax.ShapeDtypeStruct((rows, top_k), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, rows, count), jnp.float32),
        ),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
    )(arrivals, x, w[None, None], bias, correction, is_token)
    return experts, weights


def _kernel(
    arrivals_ref, x_ref, w_ref, bias_ref, correction_ref, is_token_ref,
    experts_ref, weights_ref, parts_ref,
    *, choice, config, parallel,
):  # fmt: skip
    block, rows, count = pl.program_id(0), x_ref.shape[0], w_ref.shape[2]
    row = block * BLOCK_ROWS + jnp.arange(BLOCK_ROWS)
    _leave_part(x_ref, w_ref, parts_ref, row, config)
    if parallel:  # every thread's part is stored before one thread says so
        plt.debug_barrier()
    before = plt.atomic_add(arrivals_ref, (block,), jnp.ones((), jnp.int32))

    @pl.when(before == pl.num_programs(1) * pl.num_programs(2) - 1)
    def _():
        # All loads come first, so that they are in flight together. A warp has few rows to choose
        # for, and none that don't exist: its rounds are what takes longest here.
        own = block * BLOCK_ROWS + jnp.arange(min(BLOCK_ROWS, power_of_two(rows)))
        width, is_token = max(BLOCK_ROWS, power_of_two(count)), own < rows
        if is_token_ref is not None:
            is_token = plt.load(is_token_ref.at[own], mask=is_token, other=False)
        bias, correction = (_load_row(ref, width) for ref in (bias_ref, correction_ref))
        logits = _load_sums(parts_ref, own, width)
        logits = logits if bias is None else logits + bias
        experts, weights = _choose(choice, logits, correction, count)
        place, exists = _places(own, experts.shape[1], experts_ref.shape)
        plt.store(experts_ref.at[place], jnp.where(is_token[:, None], experts, -1), mask=exists)
        plt.store(weights_ref.at[place], weights, mask=exists)
        arrivals_ref[block] = 0


def _leave_part(x_ref: Any, w_ref: Any, parts_ref: Any, row: jax.Array, config: Config) -> None:
    """Stores a program's part of the logits of a block of rows."""
    (rows, size), inputs = x_ref.shape, config.inputs
    expert = pl.program_id(1) * config.experts + jnp.arange(config.experts)
    split, steps = pl.program_id(2), pl.cdiv(size, inputs)
    share = pl.cdiv(steps, config.splits)
    start = split * share
    own = share if steps % config.splits == 0 else jnp.minimum(share, steps - start)
    (logits,) = tile_products(x_ref, row, row < rows, w_ref, 0, expert, start * inputs, own, inputs)
    shape = logits.T.shape
    token, column = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(expert[None, :], shape)
    place = (jnp.full(shape, split), token, column)
    exists = (token < rows) & (column < parts_ref.shape[2])
    plt.store(parts_ref.at[place], logits.T, mask=exists)


def _places(
    row: jax.Array, width: int, shape: tuple[int, ...]
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The places of a tile [rows, width] in an array of that shape, and which of them it has."""
    tile = row.shape[0], width
    rows = jnp.broadcast_to(row[:, None], tile)
    columns = jnp.broadcast_to(jnp.arange(width)[None, :], tile)
    return (rows, columns), (rows < shape[0]) & (columns < shape[1])


def _load_sums(parts_ref: Any, row: jax.Array, width: int) -> jax.Array:
    """The sums float32 [rows, width] of the parts; zero where there are none."""
    splits, rows, count = parts_ref.shape
    place, exists = _places(row, width, (rows, count))
    parts = [
        plt.load(parts_ref.at[jnp.full(exists.shape, split), *place], mask=exists, other=0)
        for split in range(splits)
    ]
    return functools.reduce(jnp.add, parts)


def _load_row(ref: Any, width: int) -> jax.Array | None:
    """An array [E] as float32 [1, width], with zeros behind it; None where there is no array."""
    if ref is None:
        return None
    column = jnp.arange(width)
    values = plt.load(ref.at[column], mask=column < ref.shape[0], other=0)
    return values.astype(jnp.float32)[None, :]


def _choose(
    choice: _Choice, logits: jax.Array, correction: jax.Array | None, count: int
) -> tuple[jax.Array, jax.Array]:
    """The experts and weights [rows, columns] of logits [rows, width], of which the first ``count``
    columns are experts'; of what comes out, the first top_k columns are wanted.

    In rounds of finding the best of those that are left: counting how many are better than each
    would take no rounds, but rows * width * width comparisons.
    """
    rows, width = logits.shape
    expert = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    scores = SCORES[choice.scores](jnp.where(expert < count, logits, -jnp.inf))
    wanted = scores if correction is None else scores + correction
    columns = power_of_two(choice.top_k)
    column = jnp.broadcast_to(jnp.arange(columns)[None, :], (rows, columns))

    def choose_one(i, carry):
        left, experts, weights = carry
        weight = jnp.max(left, axis=1)[:, None]
        best = jnp.min(jnp.where(left == weight, expert, width - 1), axis=1)[:, None]
        is_best = expert == best
        if correction is not None:
            weight = jnp.sum(jnp.where(is_best, scores, 0.0), axis=1)[:, None]
        return (
            jnp.where(is_best, -jnp.inf, left),
            jnp.where(column == i, best, experts),
            jnp.where(column == i, weight, weights),
        )

    carry = (
        jnp.where(expert < count, wanted, -jnp.inf),
        jnp.full((rows, columns), -1, jnp.int32),
        jnp.zeros((rows, columns), jnp.float32),
    )
    _, experts, weights = lax.fori_loop(0, choice.top_k, choose_one, carry)
    if choice.normalize:
        weights = weights / (jnp.sum(weights, axis=1)[:, None] + NO_WEIGHT)
    return experts, weights * choice.scale


# --- configurations -------------------------------------------------------------------------------


def candidates(x: jax.Array, w: jax.Array, **options: Any) -> Iterable[Config]:
    """Configurations worth timing for these arguments."""
    count, size = w.shape
    choices = itertools.product((16, 32), (128, 256, 512), (1, 2, 4, 8, 16), (4, 8), (2, 4))
    for experts, inputs, splits, warps, stages in choices:
        programs, steps = pl.cdiv(count, experts) * splits, size // (inputs * splits)
        loads = (experts + BLOCK_ROWS) * inputs * x.dtype.itemsize * stages
        if stages <= max(2, steps) and steps and 8 <= programs <= 256 and loads <= 200 << 10:
            yield Config(experts, inputs, splits, warps, stages)


def tuning_key(x: jax.Array, w: jax.Array, **options: Any) -> str:
    """What a tuned configuration depends on."""
    return f"{power_of_two(x.shape[0])}x{w.shape[0]}x{x.shape[1]} {x.dtype}"


def _chosen(x: jax.Array, w: jax.Array) -> Config:
    tuned = tuning.lookup("route_experts", "triton", tuning_key(x, w))
    return Config(**tuned) if tuned is not None else _default(x, w)


def _default(x: jax.Array, w: jax.Array) -> Config:
    """By reasoning, not measured: splits until the last program would read more of the parts than
    each does of the weight, and few steps, so that nearly all loads are in flight at once."""
    (rows, size), itemsize = x.shape, x.dtype.itemsize
    weight = BLOCK_ROWS * size * itemsize
    part = min(rows, BLOCK_ROWS) * w.shape[0] * 4
    widths = [bytes_each // itemsize for bytes_each in (1024, 512, 256)]
    splits = 1
    while splits < MAX_SPLITS and weight >= (2 * splits) ** 2 * part and size >= 2 * splits * 128:
        splits *= 2
    inputs = next((width for width in widths if size % (width * splits) == 0), widths[-1])
    return Config(BLOCK_ROWS, inputs, splits, 8, 4)
