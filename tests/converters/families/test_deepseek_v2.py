"""DeepSeek-V2 and V2-Lite."""

from __future__ import annotations

from typing import Any

import pytest

from converters.families import deepseek_v2
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import MLPSpec, MoESpec
from tests.helpers.experts import qwen_names
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 42,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "q_lora_rank": 18,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}
GROUPS = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
PUBLISHED = {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "max_position_embeddings": 163840,
    "rope_parameters": {**YARN, "original_max_position_embeddings": 4096},
}


class TestDeepseekV2(FamilyTests):
    oracle = HuggingFace("DeepseekV2Config", SMALL, published=qwen_names)
    cases = {
        "groups of experts, yarn": Case({**GROUPS, "rope_parameters": YARN}, 40),
        "queries without latents, all experts alike, tied": Case(
            {"q_lora_rank": None, "topk_method": "greedy", "tie_word_embeddings": True}
        ),
        "biases, no dense layer, unequal magnitudes": Case(
            {
                "attention_bias": True,
                "first_k_dense_replace": 0,
                "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4},
            },
            40,
        ),
        "4 heads": Case({**GROUPS, "hidden_size": 40, "num_attention_heads": 4}),
    }
    text_cases = ("groups of experts, yarn",)
    parallel_cases = ("4 heads",)
    full_sizes = {
        "DeepSeek-V2-Lite": FullSize(
            {
                **PUBLISHED,
                "hidden_size": 2048,
                "intermediate_size": 10944,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "q_lora_rank": None,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 64,
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "greedy",
            },
            15_706_484_224,
            refused=(3, 32),
        ),
        "DeepSeek-V2": FullSize(
            {
                **PUBLISHED,
                "hidden_size": 5120,
                "intermediate_size": 12288,
                "num_hidden_layers": 60,
                "num_attention_heads": 128,
                "q_lora_rank": 1536,
                "moe_intermediate_size": 1536,
                "n_routed_experts": 160,
                "n_group": 8,
                "topk_group": 3,
                "topk_method": "group_limited_greedy",
                "routed_scaling_factor": 16.0,
            },
            235_741_434_880,
            refused=(3,),
        ),
    }


def test_every_so_many_layers_have_experts_behind_the_dense_ones() -> None:
    """As in the modeling_deepseek.py published with the weights."""
    config = deepseek_v2.config({**SMALL, "num_hidden_layers": 5, "moe_layer_freq": 2})
    kinds = [type(layer.ffn) for layer in config.layers]
    assert kinds == [MLPSpec, MLPSpec, MoESpec, MLPSpec, MoESpec]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
        ({"num_key_value_heads": 1}, "num_key_value_heads other than num_attention_heads=7"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
    ],
)
def test_what_changes_the_arithmetic_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        deepseek_v2.config({**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_group": 5}, "n_group is 5; expected to divide n_routed_experts=12 into groups"),
        ({"n_group": None}, "n_group is missing"),
        ({"topk_group": 5}, "topk_group is 5; expected an integer from 1 to 4"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; expected an integer from 1 to 6"),
        ({"qk_rope_head_dim": 7}, "even head size, not 7"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        deepseek_v2.config({**SMALL, **GROUPS, **settings})
