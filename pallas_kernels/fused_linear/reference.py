"""The op in jnp. Runs anywhere; XLA's matrix products are hard to beat from about 64 rows on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.fused_linear.types import RMSNorm


def fused_linear(
    x: jax.Array,
    w: jax.Array,
    *,
    norm: RMSNorm | None = None,
    silu_gated: bool = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """See ``api.fused_linear``."""
    if norm is not None:
        x = rms_norm(x, norm.scale, norm.eps)
    y = jax.lax.dot_general(
        x,
        w.reshape(-1, w.shape[-1]),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=x.dtype,
    )
    if silu_gated:
        gate, up = jnp.split(y, 2, axis=1)
        return jax.nn.silu(gate) * up
    return y if residual is None else residual + y
