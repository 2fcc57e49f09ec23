"""DeepSeek-V3 and R1, and smaller models of their make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from converters.families import deepseek_v3
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model import kv_cache
from tests.converters.families.test_deepseek_v2 import YARN
from tests.helpers.experts import qwen_names
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace, Tensors

SMALL = {
    "vocab_size": 259,
    "hidden_size": 42,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "q_lora_rank": 18,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "n_routed_experts": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}
DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 163840,
    "rope_parameters": {
        **YARN,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def with_second_prediction(
    config: dict[str, Any], tensors: Tensors
) -> tuple[dict[str, Any], Tensors]:
    """Adds tensors of the layer that predicts a second token, which published files have."""
    there = f"model.layers.{config['num_hidden_layers']}"
    size = config["hidden_size"]
    return config, tensors | {
        f"{there}.eh_proj.weight": np.ones((size, 2 * size), np.float32),
        f"{there}.embed_tokens.weight": np.ones((config["vocab_size"], size), np.float32),
        f"{there}.shared_head.norm.weight": np.ones(size, np.float32),
    }


class TestDeepseekV3(FamilyTests):
    oracle = HuggingFace("DeepseekV3Config", SMALL, with_second_prediction, qwen_names)
    cases = {
        "yarn": Case({"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, 40),
        "queries without latents, one group, not normalized": Case(
            {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        ),
        "4 heads": Case({"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4}),
    }
    text_cases = ("yarn",)
    parallel_cases = ("4 heads",)
    full_sizes = {"DeepSeek-V3": FullSize(DEEPSEEK_V3, 671_026_419_200, refused=(3,))}


def test_the_correction_decides_the_choice(tmp_path: Path) -> None:
    """The cases above have random corrections: without them, others would be chosen."""
    from converters import open_checkpoint
    from tests.helpers.dense import dense_logits
    from tests.helpers.loading import load

    checkpoint = open_checkpoint(TestDeepseekV3().make(tmp_path, "4 heads"))
    weights, ids = load(checkpoint), FamilyTests.prompt(24)
    path = "layers/1/ffn/router_correction"
    assert weights[path].dtype == jnp.float32
    without = weights | {path: jnp.zeros_like(weights[path])}
    logits = [dense_logits(checkpoint.config, params, ids) for params in (weights, without)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_a_token_of_deepseek_v3_takes_576_numbers_a_layer_in_the_cache() -> None:
    config = deepseek_v3.config(TestDeepseekV3.oracle.config(DEEPSEEK_V3))
    assert kv_cache.bytes_per_page(config, 16, jnp.dtype("bfloat16")) == 16 * 61 * 576 * 2
    assert config.max_model_len == 163840
    assert config.layers[0].attention.scale == pytest.approx(192**-0.5 * 1.3688879454**2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave=false is not supported"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            "quantization_config is set, but quantized checkpoints are not supported yet",
        ),
    ],
)
def test_what_changes_the_arithmetic_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        deepseek_v3.config({**SMALL, "n_shared_experts": 1, **settings})


def test_groups_of_one_expert_have_no_best_two() -> None:
    with pytest.raises(CheckpointError, match="n_group is 12; expected to divide"):
        deepseek_v3.config({**SMALL, "n_shared_experts": 1, "n_group": 12})
