"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.model.config import NormSpec
from jaxserve.model.params import Param, Params
from pallas_kernels.arithmetic import rms_norm


def declare(spec: NormSpec, size: int) -> dict[str, Param]:
    """The weights of one norm over ``size`` features."""
    tree = {"scale": Param((size,), (None,), "ones", "float32" if spec.wide_scale else None)}
    if spec.kind == "layer" and spec.bias:
        tree["bias"] = Param((size,), (None,), "zeros")
    return tree


def apply(spec: NormSpec, params: Params, x: jax.Array) -> jax.Array:
    """Normalizes x [..., size] over its last axis; returns x's dtype."""
    if spec.kind == "rms":
        return rms_norm(x, params["scale"], spec.eps)
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, -1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + spec.eps)
    h = h * params["scale"].astype(jnp.float32)
    if spec.bias:
        h = h + params["bias"].astype(jnp.float32)
    return h.astype(x.dtype)
