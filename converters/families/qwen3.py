"""Qwen3 (dense): Llama, with RMSNorm on each query and key head."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Qwen3ForCausalLM",)
LAYOUT = _llama_like.LAYOUT


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_qwen3.py."""
    fields = _llama_like.open_config(hf)
    bias = fields.boolean("attention_bias", False)
    return _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=32768,
        windows=_llama_like.windows_by_layer(fields),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        default_head_size=128,
    )
