"""Gemma 2: every second layer has a window, scores and logits are capped."""

from __future__ import annotations

from typing import Any

from converters.families import _gemma, _llama_like, _rope
from converters.families._llama_like import MAX_LENGTH
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Gemma2ForCausalLM",)
LAYOUT = _gemma.LAYOUT


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_gemma2.py."""
    fields = _llama_like.open_config(hf)
    positions = fields.integer("max_position_embeddings", 8192, maximum=MAX_LENGTH)
    _, _, size = _llama_like.heads(fields, 256)
    rope, max_len = _rope.read(fields, size, positions)
    types = _gemma.layer_types(fields, 2)
    return _gemma.config(
        fields,
        ARCHITECTURES[0],
        types=types,
        ropes=dict.fromkeys(types, rope),
        max_model_len=min(max_len, MAX_LENGTH),
        attention_softcap=_gemma.softcap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_gemma.softcap(fields, "final_logit_softcapping", 30.0),
    )
