"""``linear``: x times a weight, whatever the weight's format."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.fused_linear import RMSNorm, fused_linear


def linear(
    x: jax.Array,
    w: jax.Array,
    norm: RMSNorm | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Multiplies x [T, inputs...] by a weight [outputs..., inputs...], summed in float32.

    Args:
        x: [T, inputs...], one or more input axes.
        w: its trailing axes are x's input axes.
        norm: applied to x first; only where it has one input axis.
        out_dtype: dtype of the result; x's by default.

    Returns:
        [T, outputs...].

    Raises:
        ValueError: the input axes differ.
    """
    inputs = x.shape[1:]
    outputs = w.shape[: w.ndim - len(inputs)]
    if w.shape[len(outputs) :] != inputs:
        raise ValueError(f"x {x.shape} doesn't fit the weight {w.shape}")
    # Two dimensions are what matrix-product kernels are tuned for.
    size = math.prod(inputs)
    if norm is not None:
        return fused_linear(x, w.reshape(-1, size), norm=norm).reshape(x.shape[0], *outputs)
    y = jax.lax.dot_general(
        x.reshape(-1, size),
        w.reshape(-1, size),
        (((1,), (1,)), ((), ())),
        # Whoever asks for float32 wants it: GPUs would round to TF32, TPUs to bfloat16.
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype or x.dtype,
    )
    return y.reshape(x.shape[0], *outputs)
