"""Qwen2 and Qwen2.5: Llama, with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Qwen2ForCausalLM",)
LAYOUT = _llama_like.LAYOUT


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_qwen2.py."""
    fields = _llama_like.open_config(hf)
    return _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=32768,
        windows=_llama_like.windows_by_layer(fields),
        qkv_bias=True,
    )
