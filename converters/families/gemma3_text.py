"""Gemma 3 as published without vision: five layers with a window, then one with full attention."""

from __future__ import annotations

from typing import Any

from converters.families import _gemma, _llama_like, _rope
from converters.families._llama_like import MAX_LENGTH, SLIDING
from converters.fields import Fields
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Gemma3ForCausalLM",)
LAYOUT = _gemma.LAYOUT
THETAS = {"full_attention": ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_gemma3.py."""
    return text_config(_llama_like.open_config(hf), ARCHITECTURES[0])


def text_config(fields: Fields, architecture: str) -> ModelConfig:
    """The ModelConfig of a Gemma3TextConfig. Its max_position_embeddings is the extended length."""
    fields.reject(("attn_logit_softcapping",), "Gemma 3 doesn't cap its scores.")
    positions = fields.integer("max_position_embeddings", 131072, maximum=MAX_LENGTH)
    _, _, size = _llama_like.heads(fields, 256)
    return _gemma.config(
        fields,
        architecture,
        types=_gemma.layer_types(fields, fields.integer("sliding_window_pattern", 6)),
        ropes=_rope.read_by_layer_type(fields, size, positions, THETAS),
        max_model_len=positions,
        logit_softcap=_gemma.softcap(fields, "final_logit_softcapping", None),
        qk_norm=True,
    )
