"""Llama 1 to 3.3 and the many models that share its architecture."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")
LAYOUT = _llama_like.LAYOUT


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_llama.py."""
    fields = _llama_like.open_config(hf)
    bias = fields.boolean("attention_bias", False)
    return _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=2048,
        windows=[None] * _llama_like.num_layers(fields),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )
