"""The op for few rows on NVIDIA GPUs, in Pallas with the Triton backend.

With few rows, the time goes into reading the weight once; XLA does that well only for wide weights,
and spends a kernel each on the norm, the activation and the residual. Here a program reads a block
of the weight's rows from end to end. The norm needs no pass of its own: its row factor comes out of
the sum, and is known at the end of the pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.fused_linear.types import RMSNorm
from pallas_kernels.lowering import can_lower_triton

MAX_ROWS = 16
"""Rows of the matrix unit's tile; with more, XLA's own products are better."""
MIN_PROGRAMS = 96
"""Fewer than this leave too many multiprocessors idle; XLA splits the sum of narrow weights."""


class Tiling(NamedTuple):
    """How a program's work is cut: outputs per program, inputs per step, warps, load stages."""

    outputs: int
    inputs: int
    warps: int
    stages: int


def fused_linear(
    x: jax.Array,
    w: jax.Array,
    *,
    norm: RMSNorm | None = None,
    silu_gated: bool = False,
    residual: jax.Array | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.fused_linear``; ``interpret`` runs the kernel on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise NotImplementedError("the Triton kernel takes bfloat16 and float16 only")
    rows, size = x.shape
    outputs = w.shape[-2]
    tiling = tiling or choose_tiling(outputs, silu_gated)
    if rows > MAX_ROWS or outputs % tiling.outputs or size % tiling.inputs:
        raise NotImplementedError(f"the Triton kernel doesn't tile {rows} rows by {w.shape}")
    w = w.reshape(-1, outputs, size)
    optional = [] if norm is None else [norm.scale]
    optional += [] if residual is None else [residual]
    kernel = functools.partial(
        _kernel,
        rows=rows,
        eps=None if norm is None else norm.eps,
        gated=silu_gated,
        adds=residual is not None,
        tiling=tiling,
    )
    return pl.pallas_call(
        kernel,
        name="fused_linear",
        grid=(outputs // tiling.outputs,),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
    )(x, w, *optional)


def choose_tiling(outputs: int, silu_gated: bool) -> Tiling:
    """The best of 54 tilings for the weights of Llama 1B and 8B with 8 rows on an H200."""
    tiling = Tiling(64, 128, 8, 4) if silu_gated else Tiling(64, 256, 4, 4)
    if outputs // tiling.outputs < MIN_PROGRAMS:
        raise NotImplementedError(f"{outputs} outputs are too few to keep the GPU busy")
    return tiling


def _kernel(x_ref, w_ref, *others, rows, eps, gated, adds, tiling):
    refs: list[Any] = list(others)
    scale_ref = refs.pop(0) if eps is not None else None
    residual_ref = refs.pop(0) if adds else None
    (out_ref,) = refs
    size, width, block = x_ref.shape[1], tiling.outputs, tiling.inputs
    first = pl.program_id(0) * width
    row = jnp.arange(MAX_ROWS)
    real = row < rows
    parts = 2 if gated else 1

    def step(i, carry):
        sums, squares = carry
        column = i * block + jnp.arange(block)
        index = jnp.broadcast_to(row[:, None], (MAX_ROWS, block))
        columns = jnp.broadcast_to(column[None, :], (MAX_ROWS, block))
        mask = jnp.broadcast_to(real[:, None], (MAX_ROWS, block))
        x = plt.load(x_ref.at[index, columns], mask=mask, other=0)
        if scale_ref is not None:
            wide = x.astype(jnp.float32)
            squares = squares + jnp.sum(wide * wide, axis=1)
            x = x * scale_ref[pl.ds(i * block, block)][None, :]
        weights = [
            w_ref[part, pl.ds(first, width), pl.ds(i * block, block)] for part in range(parts)
        ]
        return [s + plt.dot(w, x.T) for s, w in zip(sums, weights)], squares

    zeros = [jnp.zeros((width, MAX_ROWS), jnp.float32) for _ in range(parts)]
    carry = (zeros, jnp.zeros((MAX_ROWS,), jnp.float32))
    sums, squares = lax.fori_loop(0, size // block, step, carry)
    if eps is not None:
        factor = lax.rsqrt(squares / size + eps)[None, :]
        sums = [s * factor for s in sums]
    y = sums[0] * jax.nn.sigmoid(sums[0]) * sums[1] if gated else sums[0]
    tokens = jnp.broadcast_to(row[None, :], (width, MAX_ROWS))
    outputs = jnp.broadcast_to((first + jnp.arange(width))[:, None], (width, MAX_ROWS))
    mask = jnp.broadcast_to(real[None, :], (width, MAX_ROWS))
    if residual_ref is not None:
        y += plt.load(residual_ref.at[tokens, outputs], mask=mask, other=0).astype(jnp.float32)
    plt.store(out_ref.at[tokens, outputs], y.astype(out_ref.dtype), mask=mask)
