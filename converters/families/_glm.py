"""What GLM's families in the layout of transformers share."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from converters.rules import Layout, Rule, fuse_qkv, rotated_in_halves, split_parts
from jaxserve.model.config import ModelConfig


def config(hf: dict[str, Any], architecture: str) -> ModelConfig:
    """See transformers' configuration_glm.py: half of each head is rotated unless
    partial_rotary_factor says otherwise, and only queries, keys and values have biases."""
    fields = _llama_like.open_config(hf)
    return _llama_like.config(
        fields,
        architecture,
        default_length=131072,
        windows=[None] * _llama_like.num_layers(fields),
        qkv_bias=fields.boolean("attention_bias", True),
        default_head_size=None if "head_dim" in hf else 128,
        default_eps=1.5625e-7,
        default_partial=0.5,
    )


def layout(config: ModelConfig) -> Layout:
    """Llama's, with rotated pairs (2i, 2i + 1) and gate and up in one tensor."""
    transform = rotated_in_halves(fuse_qkv, config.rope_specs[0].rotary_size)
    attention = "layers.{i}.self_attn."
    return _llama_like.LAYOUT.with_rules(
        *(
            Rule(f"layers/{{i}}/attention/{target}", sources, transform)
            for target, sources in (
                ("qkv", tuple(f"{attention}{part}_proj.weight" for part in "qkv")),
                ("qkv_bias", tuple(f"{attention}{part}_proj.bias" for part in "qkv")),
            )
        ),
        Rule("layers/{i}/ffn/up", ("layers.{i}.mlp.gate_up_proj.weight",), split_parts),
    )
