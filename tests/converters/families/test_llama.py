"""Llama 1 to 3.3."""

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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_1 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": LLAMA3_ROPE,
}


def plain(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """Llama 1 and 2."""
    return {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
    }


class TestLlama(FamilyTests):
    oracle = HuggingFace("LlamaConfig", SMALL)
    cases = {
        "group of 3": Case(),
        "group of 1, tied": Case({"num_key_value_heads": 6, "tie_word_embeddings": True}),
        "group of 7, wide heads": Case(
            {"hidden_size": 42, "num_attention_heads": 14, "head_dim": 10}
        ),
        "group of 6, biases, gelu": Case(
            {
                "num_key_value_heads": 1,
                "attention_bias": True,
                "mlp_bias": True,
                "hidden_act": "gelu_pytorch_tanh",
            }
        ),
        "4 KV heads": Case({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}),
    }
    text_cases = ("group of 7, wide heads",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "Llama-7B, Llama-2-7B, vicuna-7b": FullSize(plain(4096, 11008, 32, 32), 6_738_415_616),
        "Llama-13B, Llama-2-13B, vicuna-13b": FullSize(plain(5120, 13824, 40, 40), 13_015_864_320),
        "Llama-65B": FullSize(
            plain(8192, 22016, 80, 64) | {"max_position_embeddings": 2048}, 65_285_660_672
        ),
        "Llama-2-70B": FullSize(
            plain(8192, 28672, 80, 64) | {"num_key_value_heads": 8}, 68_976_648_192
        ),
        "Llama-3-8B": FullSize(
            {
                **plain(4096, 14336, 32, 32),
                "vocab_size": 128256,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
            8_030_261_248,
        ),
        "Llama-3.1-70B, Llama-3.3-70B": FullSize(
            {
                **LLAMA_3_1,
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
            },
            70_553_706_496,
        ),
        "Llama-3.2-1B": FullSize(
            {
                **LLAMA_3_1,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "head_dim": 64,
                "tie_word_embeddings": True,
                "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
            },
            1_235_814_400,
        ),
        "Llama-3.2-3B": FullSize(
            {
                **LLAMA_3_1,
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_hidden_layers": 28,
                "num_attention_heads": 24,
                "head_dim": 128,
                "tie_word_embeddings": True,
                "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
            },
            3_212_749_824,
        ),
    }
