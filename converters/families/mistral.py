"""Mistral 7B and its successors: Llama, with a sliding window in every layer or none."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("MistralForCausalLM",)
LAYOUT = _llama_like.LAYOUT


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_mistral.py: a missing window is 4096, a null one is none."""
    fields = _llama_like.open_config(hf)
    window = fields.integer("sliding_window", None if "sliding_window" in hf else 4096)
    expected = "full_attention" if window is None else "sliding_attention"
    if set(fields.words("layer_types") or [expected]) != {expected}:
        raise UnsupportedModelError(
            f"{fields.where}: layer_types other than {expected!r} in every layer is not supported "
            f"for sliding_window={window}."
        )
    return _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=131072,
        windows=[window] * _llama_like.num_layers(fields),
    )
