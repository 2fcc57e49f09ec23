"""``linear``: x times a weight, whatever the weight's format."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.fused_linear import fused_linear


def linear(
    x: jax.Array,
    w: jax.Array,
    out_dtype: jnp.dtype | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies x [T, inputs...] by a weight [outputs..., inputs...], summed in float32.

    Args:
        x: [T, inputs...], one or more input axes.
        w: its trailing axes are x's input axes.
        out_dtype: dtype of the result; x's by default.
        implementation: of ``fused_linear``.

    Returns:
        [T, outputs...].

    Raises:
        ValueError: the input axes differ.
    """
    terms = linear_terms(x, w, implementation, out_dtype)
    return terms.sum(0).astype(out_dtype or x.dtype)


def linear_terms(
    x: jax.Array,
    w: jax.Array,
    implementation: Implementation | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """As ``linear``, but terms [S, T, outputs...] whose sum is the product; see ``fused_linear``.

    They are for readers that sum them up on the way: ``rope_kv_write`` and ``add_rms_norm``.
    """
    flat_x, flat_w, outputs = _two_dimensional(x, w)
    y = fused_linear(
        flat_x, flat_w, partial=True, out_dtype=out_dtype, implementation=implementation
    )
    return y.reshape(*y.shape[:2], *outputs)


def _two_dimensional(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """x and w with one input axis and one output axis, which is what kernels for matrix products
    are tuned for; and the shape of the outputs."""
    inputs = x.shape[1:]
    outputs = w.shape[: w.ndim - len(inputs)]
    if w.shape[len(outputs) :] != inputs:
        raise ValueError(f"x {x.shape} doesn't fit the weight {w.shape}")
    size = math.prod(inputs)
    return x.reshape(-1, size), w.reshape(-1, size), outputs
