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
    logits = linear(x, params["router"], jnp.float32, kernels.fused_linear)
    if spec.router.bias:
        logits = logits + params["router_bias"]
    experts, weights = choose(spec.router, logits, params.get("router_correction"))
    if is_token is not None:
        experts = jnp.where(is_token[:, None], experts, -1)
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


def choose(
    spec: RouterSpec, logits: jax.Array, correction: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Which experts each token goes through, and their weights.

    Args:
        spec: the rules.
        logits: float32 [T, experts].
        correction: float32 [experts], added for the choice only.

    Returns:
        int32 [T, top_k] and float32 [T, top_k].
    """
    scores = jax.nn.softmax(logits) if spec.scores == "softmax" else jax.nn.sigmoid(logits)
    wanted = scores if correction is None else scores + correction
    if spec.groups > 1:
        wanted = _of_best_groups(spec, wanted)
    _, experts = jax.lax.top_k(wanted, spec.top_k)
    weights = jnp.take_along_axis(scores, experts, 1)
    if spec.normalize:
        weights = weights / (weights.sum(1, keepdims=True) + 1e-20)
    return experts, weights * spec.scale


def _of_best_groups(spec: RouterSpec, scores: jax.Array) -> jax.Array:
    """Scores [T, experts] with those outside of the best groups at minus infinity."""
    grouped = scores.reshape(scores.shape[0], spec.groups, -1)
    best, _ = jax.lax.top_k(grouped, 1 if spec.group_score == "max" else 2)
    _, chosen = jax.lax.top_k(best.sum(-1), spec.top_groups)
    kept = jax.nn.one_hot(chosen, spec.groups, dtype=bool).any(1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
