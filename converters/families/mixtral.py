"""Mixtral: Mistral with experts, of which each token takes the best two."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like, _moe
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("MixtralForCausalLM",)
_EXPERT = "block_sparse_moe.experts.{e}."
LAYOUT = _moe.with_expert_rules(
    _llama_like.LAYOUT,
    "block_sparse_moe.gate.weight",
    f"{_EXPERT}w1.weight",
    f"{_EXPERT}w3.weight",
    f"{_EXPERT}w2.weight",
)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_mixtral.py: a missing or null window is none."""
    fields = _llama_like.open_config(hf)
    window = fields.integer("sliding_window", None)
    dense = _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=131072,
        default_theta=1e6,
        default_eps=1e-5,
        windows=[window] * _llama_like.num_layers(fields),
    )
    moe = _moe.spec(fields, count="num_local_experts", width="intermediate_size", normalize=True)
    return _moe.with_experts(dense, moe)
