"""The feed-forward half of a decoder layer."""

from __future__ import annotations

import jax

from jaxserve.distributed import reduce_terms
from jaxserve.model.config import MLPSpec
from jaxserve.model.params import Param, Params
from jaxserve.quant import linear, linear_terms
from pallas_kernels.arithmetic import ACTIVATIONS
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.fused_linear import fused_linear


def declare(spec: MLPSpec, hidden_size: int) -> dict[str, Param]:
    """Weights; ``up`` holds [gate, up] when gated. Layout is [outputs, inputs], as in HF files."""
    parts, size = (2 if spec.gated else 1), spec.intermediate_size
    tree = {
        "up": Param((parts, size, hidden_size), (None, "ffn", None)),
        "down": Param((hidden_size, size), (None, "ffn")),
    }
    if spec.up_bias:
        tree["up_bias"] = Param((parts, size), (None, "ffn"), "zeros")
    if spec.down_bias:
        tree["down_bias"] = Param((hidden_size,), (None,), "zeros")
    return tree


def apply(
    spec: MLPSpec,
    params: Params,
    x: jax.Array,
    kernels: Kernels = CHOOSE,
) -> jax.Array:
    """Maps x [T, hidden] to terms [S, T, hidden] whose sum is the network's output."""
    terms = partial_terms(spec, params, x, kernels)
    return reduce_terms(terms, params.get("down_bias"))


def partial_terms(spec: MLPSpec, params: Params, x: jax.Array, kernels: Kernels) -> jax.Array:
    """This device's part of the terms [S, T, hidden], without the last bias."""
    if spec.gated and spec.activation == "silu" and not spec.up_bias:
        h = fused_linear(x, params["up"], silu_gated=True, implementation=kernels.fused_linear)
    else:
        up = linear(x, params["up"], implementation=kernels.fused_linear)
        if spec.up_bias:
            up = up + params["up_bias"]
        activation = ACTIVATIONS[spec.activation]
        h = activation(up[:, 0]) * up[:, 1] if spec.gated else activation(up[:, 0])
    return linear_terms(h, params["down"], kernels.fused_linear)
