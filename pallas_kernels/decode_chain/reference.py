"""The op in jnp. Runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_chain.types import ChainWeights
from pallas_kernels.fused_linear.reference import fused_linear


def decode_chain(
    x: jax.Array, attended: jax.Array, weights: ChainWeights
) -> tuple[jax.Array, jax.Array]:
    """See ``api.decode_chain``."""
    norm, next_norm = weights.norm, weights.next_norm
    x = x + fused_linear(attended, weights.out)
    gated = fused_linear(rms_norm(x, norm.scale, norm.eps), weights.up, silu_gated=True)
    x = x + fused_linear(gated, weights.down)
    h = rms_norm(x, next_norm.scale, next_norm.eps)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x, fused_linear(h, weights.next, out_dtype=wide)
