"""The op for up to 64 rows on NVIDIA GPUs, in Pallas with the Triton backend.

With few rows, the time goes into reading the weight once, and into the kernels around the product.
Here a program reads a block of the weight's rows, or a range of their columns: narrow weights have
too few rows to keep all multiprocessors busy. The sum over such splits is left to whoever reads the
result (``partial``).
"""

from __future__ import annotations

import functools
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

MIN_ROWS = 16
"""Rows of the matrix unit's smallest tile."""
MAX_ROWS = 64
"""With more, the tensor cores are the limit: see ``mosaic_gpu``, and cuBLAS is as good."""
MIN_PROGRAMS = 96
"""Fewer than this leave too many multiprocessors idle."""
MAX_SPLITS = 8
"""More would cost whoever sums them up too much."""


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
        outputs: rows of the weight per program.
        inputs: columns per step of its loop.
        splits: programs that share the columns; more than one only where ``partial`` is asked for.
        warps, stages: of the compiler, warps per program and loads in flight.
    """

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def fused_linear(
    x: jax.Array,
    w: jax.Array,
    *,
    silu_gated: bool = False,
    partial: bool = False,
    out_dtype: jnp.dtype | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.fused_linear``; ``interpret`` runs the kernel on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise NotImplementedError("the Triton kernel takes bfloat16 and float16 only")
    rows, size = x.shape
    outputs = w.shape[-2]
    if rows > MAX_ROWS:
        raise NotImplementedError(f"the Triton kernel is not made for {rows} rows")
    config = config or _chosen(x, w, silu_gated=silu_gated, partial=partial)
    if outputs % config.outputs or size % (config.inputs * config.splits):
        raise NotImplementedError(f"the Triton kernel doesn't tile {w.shape} by {config}")
    if config.splits > 1 and not partial:
        raise NotImplementedError("only partial sums can be split")
    kernel = functools.partial(
        _kernel,
        rows=rows,
        padded_rows=max(MIN_ROWS, power_of_two(rows)),
        gated=silu_gated,
        config=config,
    )
    result = jax.ShapeDtypeStruct((rows, outputs), out_dtype or x.dtype)
    if partial:
        result = jax.ShapeDtypeStruct((config.splits, rows, outputs), jnp.float32)
    return pl.pallas_call(
        kernel,
        name="fused_linear",
        grid=(outputs // config.outputs, config.splits),
        out_shape=result,
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
    )(x, w.reshape(-1, outputs, size))


def _kernel(x_ref, w_ref, out_ref, *, rows, padded_rows, gated, config):
    size, width, block = x_ref.shape[1], config.outputs, config.inputs
    output, split = pl.program_id(0) * width, pl.program_id(1)
    share = size // config.splits
    row = jnp.arange(padded_rows)
    parts = 2 if gated else 1

    def step(i, sums):
        first = split * share + i * block
        index = jnp.broadcast_to(row[:, None], (padded_rows, block))
        columns = jnp.broadcast_to(first + jnp.arange(block)[None, :], (padded_rows, block))
        if rows == padded_rows:
            x = plt.load(x_ref.at[index, columns])
        else:
            x = plt.load(x_ref.at[index, columns], mask=index < rows, other=0)
        weights = [w_ref[part, pl.ds(output, width), pl.ds(first, block)] for part in range(parts)]
        return [s + plt.dot(w, x.T) for s, w in zip(sums, weights)]

    zeros = [jnp.zeros((width, padded_rows), jnp.float32) for _ in range(parts)]
    sums = lax.fori_loop(0, share // block, step, zeros)
    y = sums[0] * jax.nn.sigmoid(sums[0]) * sums[1] if gated else sums[0]
    tokens = jnp.broadcast_to(row[None, :], (width, padded_rows))
    outputs = jnp.broadcast_to((output + jnp.arange(width))[:, None], (width, padded_rows))
    place: tuple[jax.Array, ...] = (tokens, outputs)
    if len(out_ref.shape) == 3:
        place = (jnp.full((width, padded_rows), split), *place)
    plt.store(out_ref.at[place], y.astype(out_ref.dtype), mask=tokens < rows)


# --- configurations -------------------------------------------------------------------------------


def candidates(x: jax.Array, w: jax.Array, **options: Any) -> Iterable[Config]:
    """Configurations worth timing for these arguments."""
    rows, size = max(MIN_ROWS, power_of_two(x.shape[0])), x.shape[1]
    outputs, parts = w.shape[-2], 2 if options.get("silu_gated") else 1
    for width in (16, 32, 64, 128):
        for block in (64, 128, 256, 512):
            for splits in (1, 2, 4, 8) if options.get("partial") else (1,):
                programs = outputs // width * splits
                if outputs % width or size % (block * splits) or not 60 <= programs <= 1200:
                    continue
                for warps in (2, 4) if width <= 32 else (4, 8):
                    for stages in (3, 4, 6):
                        loads = (parts * width + rows) * block * 2 * stages
                        registers = parts * width * rows // (32 * warps)
                        if 40 << 10 <= loads <= 200 << 10 and registers <= 128:
                            yield Config(width, block, splits, warps, stages)


def tuning_key(x: jax.Array, w: jax.Array, **options: Any) -> str:
    """What a tuned configuration depends on."""
    rows = max(MIN_ROWS, power_of_two(x.shape[0]))
    kind = "gated" if options.get("silu_gated") else "plain"
    kind = "partial" if options.get("partial") else kind
    return f"{rows}x{w.shape[-2]}x{x.shape[1]} {kind}"


def _chosen(x: jax.Array, w: jax.Array, **options: Any) -> Config:
    tuned = tuning.lookup("fused_linear", "triton", tuning_key(x, w, **options))
    return Config(**tuned) if tuned is not None else _default(x, w, **options)


def _default(x: jax.Array, w: jax.Array, **options: Any) -> Config:
    """The best for the weights of Llama 1B and 8B at 8 to 64 rows on an H200, or close to it."""
    outputs, size = w.shape[-2:]
    inputs = next((block for block in (128, 64, 32) if size % block == 0), 16)
    splits = 1
    while (
        options.get("partial")
        and splits < MAX_SPLITS
        and outputs // 64 * splits < MIN_PROGRAMS
        and size % (2 * splits * inputs) == 0
    ):
        splits *= 2
    return Config(64, inputs, splits, 4, 4)
