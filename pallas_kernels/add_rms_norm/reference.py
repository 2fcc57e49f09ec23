"""The op in jnp. Runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms_norm.types import RMSNorm
from pallas_kernels.arithmetic import rms_norm


def add_rms_norm(x: jax.Array, delta: jax.Array, norm: RMSNorm) -> tuple[jax.Array, jax.Array]:
    """See ``api.add_rms_norm``."""
    total = x.astype(jnp.float32) + delta.sum(0, dtype=jnp.float32)
    x = total.astype(x.dtype)
    return x, rms_norm(x, norm.scale, norm.eps)
