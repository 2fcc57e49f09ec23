"""Qwen1.5 and Qwen2 with experts, one of them for every token."""

from __future__ import annotations

import pytest

from converters.families import qwen2_moe
from jaxserve.errors import UnsupportedModelError
from tests.helpers.experts import qwen_names
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts": 9,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 20,
    "layer_types": ["full_attention", "sliding_attention"],
}


class TestQwen2Moe(FamilyTests):
    oracle = HuggingFace("Qwen2MoeConfig", SMALL, published=qwen_names)
    cases = {
        "group of 3, windows": Case(WINDOWS, 40),
        "group of 1, tied, normalized, a dense layer": Case(
            {
                "num_key_value_heads": 6,
                "tie_word_embeddings": True,
                "norm_topk_prob": True,
                "mlp_only_layers": [0],
            }
        ),
        "group of 7, every other layer has experts, no biases": Case(
            {
                "hidden_size": 56,
                "num_attention_heads": 14,
                "decoder_sparse_step": 2,
                "qkv_bias": False,
            }
        ),
        "devices share out 8 experts": Case(
            {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "head_dim": 8}
        ),
    }
    text_cases = ("group of 3, windows",)
    parallel_cases = ("devices share out 8 experts",)
    full_sizes = {
        "Qwen1.5-MoE-A2.7B": FullSize(
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts": 60,
                "max_position_embeddings": 8192,
            },
            14_315_784_192,
        ),
        "Qwen2-57B-A14B": FullSize(
            {
                "vocab_size": 151936,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "max_position_embeddings": 32768,
            },
            57_408_658_944,
            sizes=(1, 2, 4),
            refused=(8,),
        ),
    }


def test_windows_need_layer_types() -> None:
    settings = {**SMALL, **WINDOWS, "layer_types": None}
    with pytest.raises(UnsupportedModelError, match="use_sliding_window without layer_types"):
        qwen2_moe.config(settings)
