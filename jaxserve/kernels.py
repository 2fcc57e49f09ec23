"""Kernels of the user's own: found, tested on the model's shapes, and handed to the engine."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxserve.errors import ConfigError
from jaxserve.log import logger
from jaxserve.model.config import AttentionSpec, LatentAttentionSpec, MLPSpec, ModelConfig, MoESpec
from pallas_kernels.dispatch import Kernels
from pallas_kernels.lab import gates
from pallas_kernels.lab.ops import Candidate, Op, find_candidate, find_op
from pallas_kernels.workload import LayerShape

SEED = 0
"""Of the inputs; the lab's ``check`` takes fresh ones."""


def overridden(
    overrides: dict[str, str], model: ModelConfig, page_size: int, dtype: jnp.dtype
) -> Kernels:
    """The kernels that EngineConfig.kernel_overrides names, once they have passed their gates.

    Args:
        overrides: op -> "module:function".
        model: as split over the devices.
        page_size: tokens per KV page.
        dtype: of weights, activations and cache.

    Raises:
        ConfigError: a function isn't there, or gives wrong results, or can run none of the cases.
    """
    layers = layer_shapes(model, page_size, dtype)
    functions = {}
    for name, spec in overrides.items():
        op = find_op(name)
        try:
            candidate = find_candidate(op, spec)
        except LookupError as error:
            raise ConfigError(f"kernel_overrides: {error}.") from error
        _test(op, candidate, layers)
        functions[name] = candidate.function
    return Kernels(**functions)


def _test(op: Op, candidate: Candidate, layers: list[LayerShape]) -> None:
    cases: list[Any] = [case for layer in layers for case in op.gate_cases(layer)]
    if not cases:
        raise ConfigError(f"kernel_overrides: no layer of the model has {op.name}; leave it out.")
    unable = []
    for case in cases:
        verdict = gates.check(op, candidate, case, SEED, interpret=False)
        if verdict.status == "failed":
            raise ConfigError(
                f"kernel_overrides: {candidate.name} fails as {op.name}, gate {verdict.gate!r}, in "
                f"{case} with seed {SEED}: {verdict.message}."
            )
        if verdict.status == "unsupported":
            unable.append(f"{case.name} ({verdict.message})")
    if len(unable) == len(cases):
        raise ConfigError(
            f"kernel_overrides: {candidate.name} can run no case of {op.name}: {'; '.join(unable)}."
        )
    rest = f"; left to others: {'; '.join(unable)}" if unable else ""
    passed = len(cases) - len(unable)
    logger.info("%s: %s passed %d cases%s.", op.name, candidate.name, passed, rest)


def layer_shapes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> list[LayerShape]:
    """The distinct layers of a model, as its kernels see them."""
    shapes = (
        LayerShape(
            heads=layer.attention.num_heads,
            kv_heads=layer.attention.num_kv_heads,
            head_size=layer.attention.head_size,
            hidden=model.hidden_size,
            ffn=layer.ffn.intermediate_size,
            page_size=page_size,
            sliding_window=layer.attention.sliding_window,
            rotates=(rope := layer.attention.rope) is not None,
            rotary_size=None if rope is None else rope.rotary_size,
            dtype=dtype.name,
            **_own(layer.attention),
            **_own_experts(layer.ffn),
        )
        for layer in model.layers
    )
    return list(dict.fromkeys(shapes))


def _own(attention: AttentionSpec | LatentAttentionSpec) -> dict[str, Any]:
    """What a LayerShape says of one kind of attention only."""
    if isinstance(attention, LatentAttentionSpec):
        return {"latent_size": attention.latent_size}
    norm = attention.qk_norm
    return {
        "normalizes": norm is not None and norm.kind == "rms",
        "softcap": attention.softcap,
        "alibi": attention.alibi,
        "sinks": attention.sinks,
    }


def _own_experts(ffn: MLPSpec | MoESpec) -> dict[str, Any]:
    """What a LayerShape says of a mixture of experts only."""
    if isinstance(ffn, MLPSpec):
        return {}
    return {
        "num_experts": ffn.num_experts,
        "top_k": ffn.router.top_k,
        "activation": ffn.activation,
        "biased": ffn.bias,
    }
