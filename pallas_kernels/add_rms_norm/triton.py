"""The op for NVIDIA GPUs, in Pallas with the Triton backend: one pass instead of XLA's three.

A program holds a whole row in registers: it reads x and the terms, and writes the sum (over x) and
the normalized row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.add_rms_norm.types import RMSNorm
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import can_lower_triton

MAX_WIDTH = 16384
"""A longer row would not fit into a program's registers."""


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    norm: RMSNorm,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See ``api.add_rms_norm``; ``interpret`` runs the kernel on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    rows, size = x.shape
    width = power_of_two(size)
    if width > MAX_WIDTH:
        raise NotImplementedError(f"rows of {size} numbers are too long for the Triton kernel")
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, width=width, eps=norm.eps),
        name="add_rms_norm",
        grid=(rows,),
        out_shape=(shape, shape),
        input_output_aliases={0: 0},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=max(1, min(8, width // 512)), num_stages=1),
    )(x, delta, norm.scale)


def _kernel(x_ref, delta_ref, scale_ref, sum_ref, out_ref, *, width, eps):
    size = x_ref.shape[1]
    column = jnp.arange(width)
    place = jnp.full((width,), pl.program_id(0)), column
    real = column < size
    total = plt.load(x_ref.at[place], mask=real, other=0).astype(jnp.float32)
    for term in range(delta_ref.shape[0]):
        index = (jnp.full((width,), term), *place)
        total += plt.load(delta_ref.at[index], mask=real, other=0).astype(jnp.float32)
    x = total.astype(sum_ref.dtype)
    plt.store(sum_ref.at[place], x, mask=real)
    h = x.astype(jnp.float32)
    h = h * lax.rsqrt(jnp.sum(h * h) / size + eps)
    scale = plt.load(scale_ref.at[column], mask=real, other=0)
    plt.store(out_ref.at[place], (h.astype(scale.dtype) * scale).astype(out_ref.dtype), mask=real)
