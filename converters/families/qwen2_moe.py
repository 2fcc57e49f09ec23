"""Qwen1.5 and Qwen2 with experts: Qwen2, and besides its experts one that every token takes."""

from __future__ import annotations

import dataclasses
from typing import Any

from converters.families import _llama_like, _moe
from converters.families._llama_like import MAX_WIDTH
from converters.rules import Rule, stack_parts
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import MLPSpec, ModelConfig

ARCHITECTURES = ("Qwen2MoeForCausalLM",)
_HERE, _THERE = "layers/{i}/ffn/shared", "layers.{i}.mlp.shared_expert"
_EXPERTS = _moe.with_qwen_rules(_llama_like.LAYOUT)
LAYOUT = dataclasses.replace(
    _EXPERTS,
    rules=(
        *_EXPERTS.rules,
        Rule(
            f"{_HERE}/up",
            (f"{_THERE}.gate_proj.weight", f"{_THERE}.up_proj.weight"),
            stack_parts,
        ),
        Rule(f"{_HERE}/down", (f"{_THERE}.down_proj.weight",)),
        Rule(f"{_HERE}_gate", (f"{_THERE}_gate.weight",)),
    ),
)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_qwen2_moe.py.

    Raises:
        UnsupportedModelError: windows without "layer_types": which layers have them then, has been
            answered differently by versions of transformers.
    """
    fields = _llama_like.open_config(hf)
    if fields.boolean("use_sliding_window", False) and "layer_types" not in fields:
        raise UnsupportedModelError(
            f"{fields.where}: use_sliding_window without layer_types is not supported; name the "
            "layers that have a window in layer_types."
        )
    windows = _llama_like.windows_by_layer(fields)
    dense = _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=32768,
        windows=windows,
        qkv_bias=fields.boolean("qkv_bias", True),
    )
    moe = _moe.spec(
        fields,
        count="num_experts",
        width="moe_intermediate_size",
        normalize=fields.boolean("norm_topk_prob", False),
    )
    width = fields.integer("shared_expert_intermediate_size", maximum=MAX_WIDTH)
    shared = MLPSpec(width, moe.activation)  # type: ignore[arg-type]
    moe = dataclasses.replace(moe, shared=shared, shared_gate=True)
    return _moe.with_experts(dense, moe, _moe.qwen_dense_layers(fields, len(windows)))
