"""Qwen3 with experts."""

from __future__ import annotations

import pytest

from converters.families import qwen3_moe
from jaxserve.errors import CheckpointError
from jaxserve.model.config import MLPSpec, MoESpec
from tests.helpers.experts import qwen_names
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "moe_intermediate_size": 12,
    "num_experts": 9,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
}
QWEN3 = {
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
}


class TestQwen3Moe(FamilyTests):
    oracle = HuggingFace("Qwen3MoeConfig", SMALL, published=qwen_names)
    cases = {
        "group of 3, windows": Case({"use_sliding_window": True, "sliding_window": 20}, 40),
        "group of 1, tied, biases, a dense layer": Case(
            {
                "num_key_value_heads": 6,
                "tie_word_embeddings": True,
                "attention_bias": True,
                "mlp_only_layers": [0],
                "norm_topk_prob": False,
            }
        ),
        "group of 7, every other layer has experts": Case(
            {"num_attention_heads": 14, "decoder_sparse_step": 2, "hidden_act": "gelu"}
        ),
        "4 KV heads": Case(
            {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8},
        ),
    }
    text_cases = ("group of 3, windows",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "Qwen3-30B-A3B": FullSize(
            {
                **QWEN3,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
            },
            30_532_122_624,
        ),
        "Qwen3-235B-A22B": FullSize(
            {
                **QWEN3,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "moe_intermediate_size": 1536,
                "num_hidden_layers": 94,
                "num_attention_heads": 64,
            },
            235_093_634_560,
        ),
    }


def test_which_layers_have_experts() -> None:
    """Every third, but for those named."""
    settings = {"num_hidden_layers": 9, "decoder_sparse_step": 3, "mlp_only_layers": [5]}
    layers = qwen3_moe.config({**SMALL, **settings}).layers
    with_experts = [i for i, layer in enumerate(layers) if isinstance(layer.ffn, MoESpec)]
    assert with_experts == [2, 8]
    assert layers[5].ffn == MLPSpec(56, "silu")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_experts_per_tok", 10, "num_experts_per_tok is 10; expected an integer from 1 to 9"),
        ("num_experts", None, "num_experts is missing"),
        ("mlp_only_layers", [1, "2"], "mlp_only_layers is .* expected a list of integers"),
        ("decoder_sparse_step", 0, "decoder_sparse_step is 0"),
    ],
)
def test_values_without_sense_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        qwen3_moe.config({**SMALL, key: value})
