"""Qwen2 and Qwen2.5."""

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
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}


def size(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    """Those up to 3B have a smaller table, and reuse it for the logits."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": vocab == 151936,
    }


class TestQwen2(FamilyTests):
    """Qwen2 and Qwen2.5 have the same shapes."""

    oracle = HuggingFace("Qwen2Config", SMALL)
    cases = {
        "window in one layer, group of 3": Case(WINDOW),
        "tied, group of 7": Case(
            {"hidden_size": 56, "num_attention_heads": 14, "tie_word_embeddings": True}
        ),
        "layer types": Case(
            {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        "4 KV heads": Case(
            {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, **WINDOW}
        ),
    }
    text_cases = ("window in one layer, group of 3",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "Qwen2.5-0.5B": FullSize(
            size(896, 4864, 24, 14, 2, 151936), 494_032_768, sizes=(1, 2), refused=(4, 8)
        ),
        "Qwen2.5-1.5B": FullSize(
            size(1536, 8960, 28, 12, 2, 151936), 1_543_714_304, sizes=(1, 4), refused=(8,)
        ),
        "Qwen2.5-3B": FullSize(size(2048, 11008, 36, 16, 2, 151936), 3_085_938_688),
        "Qwen2.5-7B": FullSize(
            size(3584, 18944, 28, 28, 4, 152064), 7_615_616_512, sizes=(1, 4), refused=(8,)
        ),
        "Qwen2.5-14B": FullSize(size(5120, 13824, 48, 40, 8, 152064), 14_770_033_664),
        "Qwen2.5-32B": FullSize(size(5120, 27648, 64, 40, 8, 152064), 32_763_876_352),
        "Qwen2.5-72B": FullSize(size(8192, 29568, 80, 64, 8, 152064), 72_706_203_648),
    }
