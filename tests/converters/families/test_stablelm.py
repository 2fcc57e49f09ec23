"""StableLM 3B and StableLM 2 of 1.6B and 12B."""

from __future__ import annotations

import pytest

from converters.families import stablelm
from jaxserve.errors import CheckpointError
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NORMED = {"qk_layernorm": True, "use_parallel_residual": True}


class TestStableLM(FamilyTests):
    oracle = HuggingFace("StableLmConfig", SMALL)
    cases = {
        "3B: group of 1": Case(),
        "1.6B: biases, tied": Case(
            {"use_qkv_bias": True, "tie_word_embeddings": True, "partial_rotary_factor": 0.5}
        ),
        "12B: head norms, parallel, group of 3": Case({**NORMED, "num_key_value_heads": 2}),
        "group of 7": Case(
            {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, **NORMED}
        ),
        "12B: 4 heads": Case(
            {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **NORMED}
        ),
    }
    text_cases = ("12B: head norms, parallel, group of 3",)
    parallel_cases = ("12B: 4 heads",)
    full_sizes = {
        "stablelm-3b-4e1t": FullSize(
            {
                "vocab_size": 50304,
                "hidden_size": 2560,
                "intermediate_size": 6912,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
            },
            2_795_443_200,
        ),
        "stablelm-2-1_6b": FullSize(
            {
                "vocab_size": 100352,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "use_qkv_bias": True,
            },
            1_644_515_328,
        ),
        "stablelm-2-12b": FullSize(
            {
                "vocab_size": 100352,
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 4096,
                **NORMED,
            },
            12_143_185_920,
        ),
    }


def test_a_part_of_a_head_is_rotated() -> None:
    rope = stablelm.config(SMALL | {"hidden_size": 96}).layers[0].attention.rope
    assert rope is not None
    assert rope.rotary_size == 4
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor of 0\.25"):
        stablelm.config(SMALL | {"hidden_size": 72})
