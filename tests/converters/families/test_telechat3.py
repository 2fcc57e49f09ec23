"""TeleChat3, against arithmetic written from modeling_telechat3.py's description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from converters import families
from jaxserve.errors import UnsupportedModelError
from tests.helpers.arithmetic import attend, rms_norm, rotate, silu
from tests.helpers.families import Arithmetic, Case, FamilyTests, FullSize, Shapes, Tensors

ROPE = {
    "type": "telechat3-yarn",
    "factor": 3.0,  # overruled by max_position_embeddings / original_max_position_embeddings
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
SMALL = {
    "model_type": "telechat3",
    "architectures": ["TeleChat3ForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": ROPE,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "share_attention": True,
    "share_ffn": False,
    "embedding_size": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, width, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    names: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        here = f"model.layers.{index}."
        names |= {
            f"{here}input_layernorm.weight": (hidden,),
            f"{here}self_attn.q_proj.weight": (query, hidden),
            f"{here}self_attn.k_proj.weight": (kv, hidden),
            f"{here}self_attn.v_proj.weight": (kv, hidden),
            f"{here}self_attn.o_proj.weight": (hidden, query),
            f"{here}post_attention_layernorm.weight": (hidden,),
            f"{here}mlp.gate_proj.weight": (width, hidden),
            f"{here}mlp.up_proj.weight": (width, hidden),
            f"{here}mlp.down_proj.weight": (hidden, width),
        }
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = (vocab, hidden)
    return names


def rope(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Frequencies, and the factor of cos and sin."""
    size, theta, scaling = config["head_dim"], config["rope_theta"], config["rope_scaling"]
    base = theta ** -(np.arange(0, size, 2) / size)
    if scaling is None:
        return base, 1.0
    original = scaling["original_max_position_embeddings"]
    factor = config["max_position_embeddings"] / original

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension(scaling["beta_slow"])), size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    return base / factor * ramp + base * (1 - ramp), 0.07 * math.log(factor) + 1


def forward(
    config: Mapping[str, Any], tensors: Tensors, token_ids: Sequence[int], prompt_len: int
) -> np.ndarray:
    eps, length = config["rms_norm_eps"], len(token_ids)
    turns, factor = rope(config)
    x = tensors["model.embed_tokens.weight"][list(token_ids)].astype(np.float64)
    for index in range(config["num_hidden_layers"]):

        def linear(x: np.ndarray, name: str, here: str = f"model.layers.{index}.") -> np.ndarray:
            return x @ tensors[f"{here}{name}_proj.weight"].T

        h = rms_norm(x, tensors[f"model.layers.{index}.input_layernorm.weight"], eps)
        q, k, v = (
            linear(h, f"self_attn.{part}").reshape(length, -1, config["head_dim"]) for part in "qkv"
        )
        h = attend(rotate(q, turns, factor), rotate(k, turns, factor), v)
        x = x + linear(h, "self_attn.o")
        h = rms_norm(x, tensors[f"model.layers.{index}.post_attention_layernorm.weight"], eps)
        x = x + linear(silu(linear(h, "mlp.gate")) * linear(h, "mlp.up"), "mlp.down")
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    return x @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


class TestTeleChat3(FamilyTests):
    oracle = Arithmetic(SMALL, shapes, forward)
    cases = {
        "eight times the original length": Case(prompt_len=120),
        "plain rope, tied": Case({"rope_scaling": None, "tie_word_embeddings": True}),
        "groups of 7": Case(
            {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56}, 60
        ),
        "4 KV heads": Case({"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32}),
    }
    text_cases = ("eight times the original length",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "TeleChat3-36B": FullSize(
            {
                "vocab_size": 131072,
                "hidden_size": 6144,
                "intermediate_size": 24576,
                "num_hidden_layers": 64,
                "num_attention_heads": 48,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
                "rope_scaling": ROPE | {"original_max_position_embeddings": 8192},
            },
            36_239_579_136,
        ),
    }


def test_the_longest_sequence_is_that_of_config_json() -> None:
    config = families.find(SMALL).config(SMALL)
    assert config.max_model_len == 256
    assert config.rope_specs[0].scaling.factor == 8.0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_hidden_layer_groups": 1}, "num_hidden_layer_groups"),
        ({"rope_scaling": {"type": "telechat4-yarn"}}, "telechat4-yarn"),
    ],
)
def test_other_arithmetic_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        families.find(SMALL).config(SMALL | change)
