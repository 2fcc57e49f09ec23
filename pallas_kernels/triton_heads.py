"""How Triton kernels read queries, keys and values that a split product has left as terms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt


def load_sum(qkv_ref: Any, index: tuple[jax.Array, ...], exists: Any, dtype: Any) -> jax.Array:
    """The sum of qkv's terms at ``index`` in its other axes, rounded, where it ``exists``."""
    total = jnp.zeros(index[0].shape, jnp.float32)
    for term in range(qkv_ref.shape[0]):
        place = jnp.full(index[0].shape, term), *index
        total += plt.load(qkv_ref.at[place], mask=exists, other=0).astype(jnp.float32)
    return total.astype(dtype)


def scaled(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """x in float32 after scaling it in the scale's dtype, as the plain norm does."""
    return (x.astype(scale.dtype) * scale).astype(dtype).astype(jnp.float32)
