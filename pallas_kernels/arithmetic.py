"""What several ops compute alike."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; Triton's tiles have no other sizes."""
    return 1 << (n - 1).bit_length()


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over x's last axis, in float32 or wider, rounded to the scale's dtype before it is
    scaled; returns x's dtype."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + eps)
    return (h.astype(scale.dtype) * scale).astype(x.dtype)
