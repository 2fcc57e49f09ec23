"""GLM-4 in the layout of transformers."""

from __future__ import annotations

import pytest

from converters.families import glm, glm4
from jaxserve.errors import UnsupportedModelError
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES = {
    "group of 3": Case(),
    "group of 1, tied, no biases": Case(
        {"num_key_value_heads": 6, "tie_word_embeddings": True, "attention_bias": False}
    ),
    "group of 7, whole heads rotated": Case(
        {"num_attention_heads": 14, "rope_parameters": {"partial_rotary_factor": 1.0}}
    ),
    "4 KV heads, a quarter rotated": Case(
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1000.0},
        }
    ),
}
GLM_9B = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


class TestGlm(FamilyTests):
    oracle = HuggingFace("GlmConfig", SMALL)
    cases = CASES
    text_cases = ("group of 3",)
    parallel_cases = ("4 KV heads, a quarter rotated",)
    full_sizes = {"glm-4-9b-chat-hf": FullSize(GLM_9B, 9_399_951_360)}


class TestGlm4(FamilyTests):
    oracle = HuggingFace("Glm4Config", SMALL)
    cases = {name: CASES[name] for name in ("group of 3", "4 KV heads, a quarter rotated")}
    text_cases = ("group of 3",)
    parallel_cases = ("4 KV heads, a quarter rotated",)
    full_sizes = {
        "GLM-4-9B-0414": FullSize({**GLM_9B, "max_position_embeddings": 32768}, 9_400_279_040),
        "GLM-4-32B-0414": FullSize(
            {
                **GLM_9B,
                "hidden_size": 6144,
                "intermediate_size": 23040,
                "num_hidden_layers": 61,
                "num_attention_heads": 48,
                "max_position_embeddings": 32768,
                "attention_bias": False,
            },
            32_566_081_536,
        ),
    }


MINIMAL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
}


@pytest.mark.parametrize("family", [glm, glm4])
def test_absent_settings_mean_what_they_mean_in_transformers(family: object) -> None:
    model = family.config(MINIMAL)  # type: ignore[attr-defined]
    attention = model.layers[0].attention
    assert attention.head_size == 128
    assert attention.rope.rotary_size == 64
    assert attention.qkv_bias and not attention.out_bias
    assert model.final_norm.eps == 1.5625e-7


@pytest.mark.parametrize("family", [glm, glm4])
def test_an_unknown_activation_is_refused(family: object) -> None:
    with pytest.raises(UnsupportedModelError, match="hidden_act='mish'"):
        family.config({**MINIMAL, "hidden_act": "mish"})  # type: ignore[attr-defined]
