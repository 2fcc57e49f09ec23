"""BLOOM and BLOOMZ, 560M to 176B."""

from __future__ import annotations

from typing import Any

import pytest

from converters.families import bloom
from jaxserve.errors import UnsupportedModelError
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "n_layer": 2,
    "n_head": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def as_published(config: dict[str, Any], tensors: Any) -> tuple[dict[str, Any], Any]:
    """The published files have no prefix, and other spellings of the sizes."""
    names = {"hidden_size": "n_embed", "n_head": "num_attention_heads"}
    config = {names.get(key, key): value for key, value in config.items()}
    return config, {name.removeprefix("transformer."): array for name, array in tensors.items()}


def size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"vocab_size": 250880, "hidden_size": hidden, "n_layer": layers, "n_head": heads}


class TestBloom(FamilyTests):
    oracle = HuggingFace("BloomConfig", SMALL, as_published)
    cases = {
        "6 heads": Case(),
        "4 heads": Case({"n_head": 4}),
        "12 heads, untied": Case({"n_head": 12, "tie_word_embeddings": False}),
    }
    text_cases = ("6 heads",)
    parallel_cases = ("4 heads",)
    full_sizes = {
        "bloom-560m": FullSize(size(1024, 24, 16), 559_214_592),
        "bloom-1b1": FullSize(size(1536, 24, 16), 1_065_314_304),
        "bloom-1b7": FullSize(size(2048, 24, 16), 1_722_408_960),
        "bloom-3b": FullSize(size(2560, 30, 32), 3_002_557_440),
        "bloom-7b1": FullSize(size(4096, 30, 32), 7_069_016_064),
        "bloom": FullSize(size(14336, 70, 112), 176_247_271_424),
    }


def test_residuals_of_normalized_states_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="apply_residual_connection_post_layernorm"):
        bloom.config({**SMALL, "apply_residual_connection_post_layernorm": True})
