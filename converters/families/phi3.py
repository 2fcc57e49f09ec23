"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama, with fused projections and longrope."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from converters.rules import Rule, split_parts, split_qkv
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Phi3ForCausalLM",)
ROPES = {kind: kind for kind in ("default", "longrope", "su")}
LAYOUT = _llama_like.LAYOUT.with_rules(
    Rule("layers/{i}/attention/qkv", ("layers.{i}.self_attn.qkv_proj.weight",), split_qkv),
    Rule("layers/{i}/ffn/up", ("layers.{i}.mlp.gate_up_proj.weight",), split_parts),
)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_phi3.py."""
    fields = _llama_like.open_config(hf)
    rope = fields.section("rope_scaling") or fields.section("rope_parameters")
    if rope is not None:  # early files call longrope "su" or "yarn"; the latter never was YaRN
        rope.choice("rope_type" if "rope_type" in rope else "type", ROPES, "default")
    window = fields.integer("sliding_window", None)
    return _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=4096,
        windows=[window] * _llama_like.num_layers(fields),
        default_eps=1e-5,
        default_partial=1.0,
    )
