"""What several ops compute alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; Triton's tiles have no other sizes."""
    return 1 << (n - 1).bit_length()


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over x's last axis, in float32 or wider, rounded to x's dtype before it is scaled."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + eps)
    return h.astype(x.dtype) * scale
