"""How an expert's gate and up parts become its hidden values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import ACTIVATIONS

LIMIT = 7.0
STEEPNESS = 1.702


def _plain(name: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[name](gate) * up


def clamped_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss's: (up + 1) * gate * sigmoid(1.702 * gate), both clamped at 7 (gate from above)."""
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(STEEPNESS * gate)


GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    **{name: functools.partial(_plain, name) for name in ACTIVATIONS},
    "clamped_silu": clamped_silu,
}
