"""The feed-forward half of a decoder layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from jaxserve.distributed import reduce_sum
from jaxserve.model.config import MLPSpec
from jaxserve.model.params import Param, Params
from jaxserve.quant import linear
from pallas_kernels.fused_linear import RMSNorm, fused_linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def declare(spec: MLPSpec, hidden_size: int) -> dict[str, Param]:
    """Weights; ``up`` holds [gate, up] when gated. Layout is [outputs, inputs], as in HF files."""
    parts, size = (2 if spec.gated else 1), spec.intermediate_size
    tree = {
        "up": Param((parts, size, hidden_size), (None, "ffn", None)),
        "down": Param((hidden_size, size), (None, "ffn")),
    }
    if spec.bias:
        tree["up_bias"] = Param((parts, size), (None, "ffn"), "zeros")
        tree["down_bias"] = Param((hidden_size,), (None,), "zeros")
    return tree


def apply(spec: MLPSpec, params: Params, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
    """Maps x [T, hidden], normalized first by ``norm``, to [T, hidden]."""
    if spec.gated and spec.activation == "silu" and not spec.bias:
        h = fused_linear(x, params["up"], norm=norm, silu_gated=True)
    else:
        up = linear(x, params["up"], norm)
        if spec.bias:
            up = up + params["up_bias"]
        activation = ACTIVATIONS[spec.activation]
        h = activation(up[:, 0]) * up[:, 1] if spec.gated else activation(up[:, 0])
    out = reduce_sum(linear(h, params["down"]))
    return out + params["down_bias"] if spec.bias else out
