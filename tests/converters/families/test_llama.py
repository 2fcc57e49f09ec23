"""Llama 1 to 3.3."""

from __future__ import annotations

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


class TestLlama(FamilyTests):
    oracle = HuggingFace("LlamaConfig", SMALL)
    cases = {
        "group of 3": Case(),
        "group of 1, tied": Case({"num_key_value_heads": 6, "tie_word_embeddings": True}),
        "group of 7, wide heads": Case(
            {"hidden_size": 42, "num_attention_heads": 14, "head_dim": 10}
        ),
        "4 KV heads": Case({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}),
    }
    text_cases = ("group of 7, wide heads",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "Llama-2-7b": FullSize(
            {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
            },
            6_738_415_616,
        ),
        "Llama-3.1-70B": FullSize(
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
    }
