"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.model.config import NormSpec
from jaxserve.model.params import Param, Params


def declare(spec: NormSpec, size: int) -> dict[str, Param]:
    """The weights of one norm over ``size`` features."""
    tree = {"scale": Param((size,), (None,), "ones")}
    if spec.kind == "layer":
        tree["bias"] = Param((size,), (None,), "zeros")
    return tree


def apply(spec: NormSpec, params: Params, x: jax.Array) -> jax.Array:
    """Normalizes x [..., size] over its last axis; returns x's dtype."""
    h = x.astype(jnp.float32)
    if spec.kind == "layer":
        h = h - jnp.mean(h, -1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + spec.eps)
    if spec.kind == "layer":
        h = h * params["scale"].astype(jnp.float32) + params["bias"].astype(jnp.float32)
        return h.astype(x.dtype)
    return h.astype(x.dtype) * params["scale"]
