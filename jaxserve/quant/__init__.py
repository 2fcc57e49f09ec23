"""``linear``: x times a weight, whatever the weight's format."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def linear(x: jax.Array, w: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """Multiplies x [T, K] by a weight stored as [outputs..., inputs...], summed in float32.

    Args:
        x: [T, K].
        w: its trailing dimensions, multiplied together, are K; the leading ones are the outputs.
        out_dtype: dtype of the result; x's by default.

    Returns:
        [T, outputs...].
    """
    axis, size = w.ndim, 1
    while size < x.shape[1]:
        axis -= 1
        size *= w.shape[axis]
    if size != x.shape[1]:
        raise ValueError(f"x {x.shape} doesn't fit the weight {w.shape}")
    outputs = w.shape[:axis]
    matrix = w.reshape(math.prod(outputs), size)
    y = jax.lax.dot_general(
        x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype or x.dtype
    )
    return y.reshape(x.shape[0], *outputs)
