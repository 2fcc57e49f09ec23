"""GLM-4-9B in the layout of transformers; "chatglm" is its first publication."""

from __future__ import annotations

from typing import Any

from converters.families import _glm
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("GlmForCausalLM",)
layout = _glm.layout


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_glm.py."""
    return _glm.config(hf, ARCHITECTURES[0])
