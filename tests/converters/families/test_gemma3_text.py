"""Gemma 3 without vision."""

from __future__ import annotations

import pytest

from converters.families import gemma3_text
from jaxserve.errors import CheckpointError, UnsupportedModelError
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    },
    "max_position_embeddings": 512,
}
GEMMA_3_1B = {
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "torch_dtype": "bfloat16",
}

DEFAULTS = GEMMA_3_1B | {"layer_types": None, "rope_parameters": None}
"""Without what makes the small model small."""


class TestGemma3Text(FamilyTests):
    oracle = HuggingFace("Gemma3TextConfig", SMALL)
    cases = {
        "group of 3, windows, linear rope": Case({}, 40),
        "group of 1, untied, biases, capped logits": Case(
            {
                "num_key_value_heads": 6,
                "tie_word_embeddings": False,
                "attention_bias": True,
                "final_logit_softcapping": 5.0,
            }
        ),
        "group of 7, windows only": Case(
            {"hidden_size": 42, "num_attention_heads": 14, "layer_types": ["sliding_attention"] * 2}
        ),
        "4 KV heads": Case({"num_attention_heads": 4, "num_key_value_heads": 4}),
    }
    text_cases = ("group of 3, windows, linear rope",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {"gemma-3-1b": FullSize(DEFAULTS, 999_885_952, sizes=(1, 2, 4), refused=(8,))}


PUBLISHED = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    **GEMMA_3_1B,
}


def test_the_published_config_means_the_same_as_that_of_transformers_5() -> None:
    hf = TestGemma3Text.oracle.config(DEFAULTS)
    assert hf["rope_parameters"].keys() == {"full_attention", "sliding_attention"}
    assert gemma3_text.config(hf | {"dtype": "bfloat16"}) == gemma3_text.config(PUBLISHED)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}}, CheckpointError, "full_attention is missing"),
        ({"rope_scaling": {"rope_type": "x"}}, UnsupportedModelError, "rope_scaling: rope_type"),
        ({"rope_local_base_freq": 0}, CheckpointError, "rope_local_base_freq is 0"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
        ({"sliding_window_pattern": 0}, CheckpointError, "sliding_window_pattern is 0"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping is set"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gemma3_text.config(PUBLISHED | changes)
