"""Qwen3 with experts: Qwen3, and in every layer or some a mixture of experts."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like, _moe
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
LAYOUT = _moe.with_qwen_rules(_llama_like.LAYOUT)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_qwen3_moe.py: the window, if used, is that of all layers."""
    fields = _llama_like.open_config(hf)
    bias = fields.boolean("attention_bias", False)
    layers = _llama_like.num_layers(fields)
    window = None
    if fields.boolean("use_sliding_window", False):
        window = fields.integer("sliding_window", None if "sliding_window" in hf else 4096)
    dense = _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=32768,
        windows=[window] * layers,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    moe = _moe.spec(
        fields,
        count=fields.named("num_experts", "num_local_experts"),  # transformers 5 writes the latter
        width="moe_intermediate_size",
        normalize=fields.boolean("norm_topk_prob", False),
    )
    return _moe.with_experts(dense, moe, _moe.qwen_dense_layers(fields, layers))
