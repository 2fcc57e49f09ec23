"""Gemma 3 with vision, of which only the text part is loaded: images aren't supported yet."""

from __future__ import annotations

import dataclasses
from typing import Any

from converters.families import _gemma, _llama_like, gemma3_text
from converters.fields import Fields
from jaxserve import log
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Gemma3ForConditionalGeneration",)
LAYOUT = dataclasses.replace(
    _gemma.LAYOUT,
    prefixes=("language_model.model.", "model.language_model.", "language_model.", "model."),
    dropped=(*_gemma.LAYOUT.dropped, "vision_tower.*", "multi_modal_projector.*"),
)
DEFAULTS = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Of the settings that the published text_config leave out, those with no default elsewhere."""
OUTER = ("dtype", "torch_dtype", "tie_word_embeddings")
"""Settings of the whole model that count for its text part as well."""


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_gemma3.py."""
    fields = _llama_like.open_config(hf)
    text = fields.section("text_config") or Fields({}, f"{fields.where}: text_config")
    given = {key: value for key, value in text.values.items() if value is not None}
    given |= {key: hf[key] for key in OUTER if key in fields}
    log.logger.info("%s: images aren't supported yet; its text part is loaded.", ARCHITECTURES[0])
    return gemma3_text.text_config(Fields(DEFAULTS | given, text.where), ARCHITECTURES[0])
