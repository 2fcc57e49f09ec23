"""GPT-2, 124M to 1.5B."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from converters.families import gpt2
from jaxserve.errors import CheckpointError, UnsupportedModelError
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def as_published(config: dict[str, Any], tensors: Any) -> tuple[dict[str, Any], Any]:
    """OpenAI's files have no prefix, and hold the causal mask of each layer."""
    tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    size = config["n_positions"]
    for layer in range(config["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = np.tri(size)[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4)
    return config, tensors


def size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


class TestGPT2(FamilyTests):
    oracle = HuggingFace("GPT2Config", SMALL, as_published)
    cases = {
        "3 heads": Case(),
        "4 heads": Case({"n_head": 4, "n_inner": 52}),
        "untied, scaled by layer": Case(
            {
                "tie_word_embeddings": False,
                "scale_attn_by_inverse_layer_idx": True,
                "activation_function": "relu",
            }
        ),
        "not scaled, upcast": Case({"scale_attn_weights": False, "reorder_and_upcast_attn": True}),
    }
    text_cases = ("3 heads",)
    parallel_cases = ("4 heads",)
    full_sizes = {
        "gpt2": FullSize(size(768, 12, 12), 124_439_808, sizes=(1, 4), refused=(8,)),
        "gpt2-medium": FullSize(size(1024, 24, 16), 354_823_168),
        "gpt2-large": FullSize(size(1280, 36, 20), 774_030_080, sizes=(1, 4), refused=(8,)),
        "gpt2-xl": FullSize(size(1600, 48, 25), 1_557_611_200, sizes=(1, 5), refused=(4, 8)),
    }


def test_other_spellings_of_the_sizes_mean_the_same() -> None:
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    assert gpt2.config({names.get(key, key): value for key, value in SMALL.items()}) == (
        gpt2.config(SMALL)
    )


def test_cross_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="add_cross_attention is not supported"):
        gpt2.config({**SMALL, "add_cross_attention": True})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(CheckpointError, match="n_embd=36 is no multiple of n_head=5"):
        gpt2.config({**SMALL, "n_head": 5})
