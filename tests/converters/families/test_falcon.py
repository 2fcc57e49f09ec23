"""Falcon: 7B, 40B, 180B, RefinedWeb's 1B and 7B, and Falcon 2 of 11B."""

from __future__ import annotations

from typing import Any

import pytest

from converters.families import falcon
from jaxserve.errors import CheckpointError, UnsupportedModelError
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEW = {
    "new_decoder_architecture": True,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
}
RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}


def size(hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 65024,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        **others,
    }


class TestFalcon(FamilyTests):
    """transformers rounds ALiBi's slope * position to bfloat16. With up to 8 heads and positions
    below 256, these numbers are exact. Its eager attention adds them twice, "sdpa" once, as the
    code published with the models does."""

    oracle = HuggingFace("FalconConfig", SMALL, attention="sdpa")
    cases = {
        "7b: one KV head": Case(),
        "40b: two norms, groups of 3": Case(NEW),
        "11b: one norm, untied": Case(
            {
                **NEW,
                "num_ln_in_parallel_attn": 1,
                "tie_word_embeddings": False,
                "ffn_hidden_size": 50,
            }
        ),
        "rw: ALiBi": Case({**RW, "hidden_size": 48, "num_attention_heads": 4}),
    }
    text_cases = ("7b: one KV head", "rw: ALiBi")
    parallel_cases = ("rw: ALiBi",)
    full_sizes = {
        "falcon-7b": FullSize(size(4544, 32, 71), 6_921_720_704, sizes=(1,), refused=(4, 8)),
        "falcon-40b": FullSize(
            size(8192, 60, 128, new_decoder_architecture=True, num_kv_heads=8), 41_303_293_952
        ),
        "falcon-180B": FullSize(
            size(14848, 80, 232, new_decoder_architecture=True, num_kv_heads=8), 178_557_088_768
        ),
        "falcon-rw-1b": FullSize(size(2048, 24, 32, **RW) | {"vocab_size": 50304}, 1_311_625_216),
        "falcon-rw-7b": FullSize(size(4096, 36, 64, **RW), 7_516_020_736),
        "falcon-11B": FullSize(
            size(
                4096,
                60,
                32,
                new_decoder_architecture=True,
                num_kv_heads=8,
                num_ln_in_parallel_attn=1,
                ffn_hidden_size=16384,
                max_position_embeddings=8192,
                rope_parameters={"rope_type": "default", "rope_theta": 500042.0},
                tie_word_embeddings=False,
            ),
            11_102_822_400,
        ),
    }


def test_the_number_of_kv_heads_is_read_by_the_new_architecture_only() -> None:
    def kv_heads(**settings: Any) -> int:
        return falcon.config({**SMALL, **settings}).layers[0].attention.num_kv_heads

    assert kv_heads(num_kv_heads=7) == 1
    assert kv_heads(multi_query=False) == 7
    assert kv_heads(new_decoder_architecture=True) == 7
    assert kv_heads(**NEW) == 2
    with pytest.raises(CheckpointError, match="no multiple of num_kv_heads=4"):
        kv_heads(**NEW | {"num_kv_heads": 4})


def test_the_new_architecture_is_parallel() -> None:
    with pytest.raises(UnsupportedModelError, match="parallel_attn=false is not supported with"):
        falcon.config({**SMALL, **NEW, "parallel_attn": False})
