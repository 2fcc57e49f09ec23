"""A mixture of experts in the place of the feed-forward network.

Over tensor-parallel devices the experts are shared out (expert parallelism): every device holds all
tokens, computes its own experts' part of them, and the parts are summed as for any split product.
Where the devices don't divide the number of experts, each expert's width is split instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.distributed import TENSOR, reduce_terms, tensor_parallel_size
from jaxserve.model import ffn
from jaxserve.model.config import MoESpec, RouterSpec
from jaxserve.model.params import Param, Params, prefixed, under
from jaxserve.quant import linear
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.route_experts import route_experts


def declare(spec: MoESpec, hidden_size: int) -> dict[str, Param]:
    """Weights; ``experts_up`` holds [gate, up] and all layouts are [experts, outputs, inputs]."""
    count, size = spec.num_experts, spec.intermediate_size
    tree = {
        "router": Param((count, hidden_size), (None, None)),
        "experts_up": Param((count, 2, size, hidden_size), ("experts", None, "ffn", None)),
        "experts_down": Param((count, hidden_size, size), ("experts", None, "ffn")),
    }
    if spec.router.bias:
        tree["router_bias"] = Param((count,), (None,), "zeros")
    if spec.router.correction:
        tree["router_correction"] = Param((count,), (None,), "zeros", "float32")
    if spec.bias:
        tree["experts_up_bias"] = Param((count, 2, size), ("experts", None, "ffn"), "zeros")
        tree["experts_down_bias"] = Param((count, hidden_size), ("experts", None), "zeros")
    if spec.shared is not None:
        tree |= prefixed("shared", ffn.declare(spec.shared, hidden_size))
    if spec.shared_gate:
        tree["shared_gate"] = Param((1, hidden_size), (None, None))
    return tree


def apply(
    spec: MoESpec,
    params: Params,
    x: jax.Array,
    kernels: Kernels = CHOOSE,
    is_token: jax.Array | None = None,
) -> jax.Array:
    """Maps x [T, hidden] to terms [S, T, hidden] whose sum is the network's output.

    ``is_token`` bool [T] is False for padding, which chooses no experts: theirs would have to be
    read besides those of the tokens.
    """
    experts, weights = _route(spec.router, params, x, kernels, is_token)
    here = params["experts_up"].shape[0]
    down_bias = params.get("experts_down_bias")
    if here < spec.num_experts:  # those of other devices lie outside of [0, here)
        experts = experts - jax.lax.axis_index(TENSOR) * here
    elif down_bias is not None and tensor_parallel_size() > 1:  # to be added once
        down_bias = jnp.where(jax.lax.axis_index(TENSOR) == 0, down_bias, 0)
    terms = expert_ffn(
        x,
        experts,
        weights,
        params["experts_up"],
        params["experts_down"],
        up_bias=params.get("experts_up_bias"),
        down_bias=down_bias,
        activation=spec.activation,
        implementation=kernels.expert_ffn,
    )
    if spec.shared is not None:
        shared = ffn.partial_terms(spec.shared, under("shared", params), x, kernels)
        if spec.shared_gate:
            gate = linear(x, params["shared_gate"], jnp.float32, kernels.fused_linear)
            gate = jax.nn.sigmoid(gate)
            shared = (shared * gate).astype(shared.dtype)
        terms = jnp.concatenate([terms, shared.astype(terms.dtype)])
    return reduce_terms(terms, None)


def _route(
    spec: RouterSpec,
    params: Params,
    x: jax.Array,
    kernels: Kernels,
    is_token: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Which experts each token goes through, int32 [T, top_k], and their weights, float32."""
    return route_experts(
        x,
        params["router"],
        top_k=spec.top_k,
        scores=spec.scores,
        normalize=spec.normalize,
        scale=spec.scale,
        groups=spec.groups,
        top_groups=spec.top_groups,
        group_score=spec.group_score,
        bias=params.get("router_bias"),
        correction=params.get("router_correction"),
        is_token=is_token,
        implementation=kernels.route_experts,
    )
