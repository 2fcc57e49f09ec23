"""TeleChat, TeleChat2 and TeleChat3, against arithmetic written from their code's description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from converters import families
from jaxserve.errors import CheckpointError, UnsupportedModelError
from tests.helpers.arithmetic import attend, rms_norm, rotate, silu
from tests.helpers.families import Arithmetic, Case, FamilyTests, FullSize, Shapes, Tensors

SMALL = {
    "model_type": "telechat",
    "architectures": ["TeleChat2ForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 40,
    "ffn_hidden_size": 52,
    "n_layer": 2,
    "n_head": 5,
    "layer_norm_epsilon": 1e-5,
    "training_seqlen": 256,
    "base_seqlen": 256,
    "tie_word_embeddings": False,
    "embed_layernorm": False,
    "eos_token_id": 2,
}
EMBED = "transformer.word_embeddings"


def shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, width = config["hidden_size"], config["ffn_hidden_size"]
    kv = config.get("num_key_value_heads", config["n_head"]) * hidden // config["n_head"]
    names: Shapes = {
        f"{EMBED}.weight": (config["vocab_size"], hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    for index in range(config["n_layer"]):
        here = f"transformer.h.{index}."
        names |= {
            f"{here}input_layernorm.weight": (hidden,),
            f"{here}self_attention.query.weight": (hidden, hidden),
            f"{here}self_attention.key_value.weight": (2 * kv, hidden),
            f"{here}self_attention.dense.weight": (hidden, hidden),
            f"{here}self_attention.dense.bias": (hidden,),
            f"{here}post_attention_layernorm.weight": (hidden,),
            f"{here}mlp.gate_proj.weight": (width, hidden),
            f"{here}mlp.up_proj.weight": (width, hidden),
            f"{here}mlp.down_proj.weight": (hidden, width),
            f"{here}mlp.down_proj.bias": (hidden,),
        }
    if config["embed_layernorm"]:
        names[f"{EMBED}_layernorm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", True):
        names["lm_head.weight"] = (config["vocab_size"], hidden)
    return names


def forward(
    config: Mapping[str, Any], tensors: Tensors, token_ids: Sequence[int], prompt_len: int
) -> np.ndarray:
    heads, eps, length = config["n_head"], config["layer_norm_epsilon"], len(token_ids)
    size = config["hidden_size"] // heads
    alpha = 2 ** math.ceil(math.log2(config["training_seqlen"] / config["base_seqlen"]) + 1) - 1
    base = 10000 * alpha ** (size / (size - 2))
    turns = base ** -(np.arange(0, size, 2) / size)
    x = tensors[f"{EMBED}.weight"][list(token_ids)].astype(np.float64)
    if config["embed_layernorm"]:
        x = rms_norm(x, tensors[f"{EMBED}_layernorm.weight"], eps)
    for index in range(config["n_layer"]):
        own = {
            name[len(f"transformer.h.{index}.") :]: t
            for name, t in tensors.items()
            if name.startswith(f"transformer.h.{index}.")
        }
        h = rms_norm(x, own["input_layernorm.weight"], eps)
        q = (h @ own["self_attention.query.weight"].T).reshape(length, heads, size)
        kv = (h @ own["self_attention.key_value.weight"].T).reshape(length, -1, 2 * size)
        k, v = np.split(kv, 2, -1)
        h = attend(rotate(q, turns), rotate(k, turns), v)
        x = x + h @ own["self_attention.dense.weight"].T + own["self_attention.dense.bias"]
        h = rms_norm(x, own["post_attention_layernorm.weight"], eps)
        h = silu(h @ own["mlp.gate_proj.weight"].T) * (h @ own["mlp.up_proj.weight"].T)
        x = x + h @ own["mlp.down_proj.weight"].T + own["mlp.down_proj.bias"]
    x = rms_norm(x, tensors["transformer.ln_f.weight"], eps)
    return x @ tensors.get("lm_head.weight", tensors[f"{EMBED}.weight"]).T


def size(hidden: int, width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "ffn_hidden_size": width, "n_layer": layers, "n_head": heads}
    return {"vocab_size": 131072, "training_seqlen": 8192, "base_seqlen": 8192} | shape | others


class TestTeleChat(FamilyTests):
    oracle = Arithmetic(SMALL, shapes, forward)
    cases = {
        "each head its own keys": Case(),
        "trained on eight times the base length": Case({"base_seqlen": 32}, 100),
        "groups of 3, tied": Case(
            {
                "hidden_size": 48,
                "n_head": 6,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            }
        ),
        "norm after the embedding": Case({"embed_layernorm": True}),
        "4 KV heads": Case({"hidden_size": 64, "n_head": 8, "num_key_value_heads": 4}),
    }
    text_cases = ("trained on eight times the base length",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "TeleChat-7B": FullSize(
            size(4096, 12288, 30, 32, vocab_size=160256, tie_word_embeddings=True), 7_200_018_432
        ),
        "TeleChat-12B": FullSize(size(5120, 12288, 38, 32, vocab_size=120000), 12_386_432_000),
        "TeleChat2-3B": FullSize(size(3072, 6144, 24, 24), 3_070_528_512),
        "TeleChat2-7B": FullSize(size(4096, 12288, 30, 32), 7_617_351_680),
        "TeleChat2-35B": FullSize(size(6144, 20480, 64, 48), 35_435_059_200),
        "TeleChat2-115B": FullSize(
            size(8192, 40960, 96, 64, num_key_value_heads=8), 113_282_916_352
        ),
    }


def test_the_first_models_lengths_stand_in_their_code() -> None:
    """Their configs lack base_seqlen: 4096 for TeleChat-7B, 8192 for TeleChat-12B."""

    def theta(**changes: Any) -> float:
        config = families.find(SMALL).config(SMALL | {"training_seqlen": 8192} | changes)
        assert config.max_model_len == 8192
        return config.rope_specs[0].theta

    size = 8
    assert theta(base_seqlen=None) == 10000
    stretched = pytest.approx(10000 * 3 ** (size / (size - 2)))
    assert theta(base_seqlen=None, tie_word_embeddings=None) == stretched
    assert theta(base_seqlen=4096) == stretched


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"num_moe_experts": 16}, UnsupportedModelError, "num_moe_experts"),
        (
            {"apply_residual_connection_post_layernorm": True},
            UnsupportedModelError,
            "apply_residual_connection_post_layernorm",
        ),
        ({"n_head": 7}, CheckpointError, "n_head=7"),
        ({"num_key_value_heads": 2}, CheckpointError, "num_key_value_heads=2"),
        ({"n_layer": None}, CheckpointError, "n_layer is missing"),
        ({"hidden_size": 25}, CheckpointError, "n_head is 5"),
    ],
)
def test_other_arithmetic_is_refused(change: dict[str, Any], error: type, word: str) -> None:
    with pytest.raises(error, match=word):
        families.find(SMALL).config(SMALL | change)
