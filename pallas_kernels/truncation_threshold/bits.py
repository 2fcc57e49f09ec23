"""Floats as integers in the same order, so that a search over them takes as many steps as bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 x (two's complement); -0.0 comes before 0.0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def from_ordered(bits: jax.Array) -> jax.Array:
    """The float32 that ``to_ordered`` made ``bits`` of."""
    bits = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
