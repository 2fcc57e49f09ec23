"""Mistral 7B, v0.1 to v0.3, and Mistral Nemo."""

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
    "sliding_window": 11,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
LONG = {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


class TestMistral(FamilyTests):
    oracle = HuggingFace("MistralConfig", SMALL)
    cases = {
        "window, group of 3": Case(),
        "no window, group of 7, wide heads": Case(
            {"hidden_size": 42, "num_attention_heads": 14, "head_dim": 10, **LONG}
        ),
        "window, 4 KV heads": Case(
            {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
        ),
    }
    text_cases = ("window, group of 3",)
    parallel_cases = ("window, 4 KV heads",)
    full_sizes = {
        "Mistral-7B-v0.1": FullSize(MISTRAL_7B, 7_241_732_096),
        "Mistral-7B-v0.3": FullSize({**MISTRAL_7B, **LONG, "vocab_size": 32768}, 7_248_023_552),
        "Mistral-Nemo": FullSize(
            {
                **MISTRAL_7B,
                **LONG,
                "vocab_size": 131072,
                "hidden_size": 5120,
                "num_hidden_layers": 40,
                "head_dim": 128,
                "max_position_embeddings": 131072,
            },
            12_247_782_400,
        ),
    }
