"""GLM-4-0414 and GLM-Z1: GLM, with norms on the output of each half as well."""

from __future__ import annotations

import dataclasses
from typing import Any

from converters.families import _glm
from converters.rules import Layout, Rule
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Glm4ForCausalLM",)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_glm4.py and modeling_glm4.py."""
    model = _glm.config(hf, ARCHITECTURES[0])
    layers = (dataclasses.replace(layer, norm_order="sandwich") for layer in model.layers)
    return dataclasses.replace(model, layers=tuple(layers))


def layout(config: ModelConfig) -> Layout:
    """GLM's; post_attention_layernorm stands before the feed-forward half, as in Llama."""
    here, there = "layers/{i}/", "layers.{i}."
    return _glm.layout(config).with_rules(
        Rule(f"{here}attention_out_norm/scale", (f"{there}post_self_attn_layernorm.weight",)),
        Rule(f"{here}ffn_out_norm/scale", (f"{there}post_mlp_layernorm.weight",)),
    )
