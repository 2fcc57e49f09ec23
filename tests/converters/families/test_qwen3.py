"""Qwen3, dense: 0.6B to 32B."""

from __future__ import annotations

from typing import Any

from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}


def size(hidden: int, ffn: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": tied,
    }


class TestQwen3(FamilyTests):
    oracle = HuggingFace("Qwen3Config", SMALL)
    cases = {
        "wide heads, group of 3": Case(),
        "window in one layer, biases": Case({**WINDOW, "attention_bias": True}),
        "tied, group of 7": Case({"num_attention_heads": 14, "tie_word_embeddings": True}),
        "4 KV heads": Case({"num_attention_heads": 4, "num_key_value_heads": 4}),
    }
    text_cases = ("window in one layer, biases",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "Qwen3-0.6B": FullSize(size(1024, 3072, 28, 16, tied=True), 596_049_920),
        "Qwen3-1.7B": FullSize(size(2048, 6144, 28, 16, tied=True), 1_720_574_976),
        "Qwen3-4B": FullSize(size(2560, 9728, 36, 32, tied=True), 4_022_468_096),
        "Qwen3-8B": FullSize(size(4096, 12288, 36, 32), 8_190_735_360),
        "Qwen3-14B": FullSize(size(5120, 17408, 40, 40), 14_768_307_200),
        "Qwen3-32B": FullSize(size(5120, 25600, 64, 64), 32_762_123_264),
    }
