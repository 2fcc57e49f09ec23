"""Mixtral: experts, all chosen by the softmax over the best two."""

from __future__ import annotations

from converters.families import mixtral
from jaxserve.model.config import RouterSpec
from tests.helpers.experts import tensor_per_expert
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
NAMES = tensor_per_expert(
    "w1", "w3", "w2", lambda name: name.replace(".mlp.", ".block_sparse_moe.")
)


class TestMixtral(FamilyTests):
    oracle = HuggingFace("MixtralConfig", SMALL, published=NAMES)
    cases = {
        "group of 3, windows": Case({"sliding_window": 20}, 40),
        "group of 1, three of 8 experts, tied": Case(
            {
                "num_key_value_heads": 6,
                "num_local_experts": 8,
                "num_experts_per_tok": 3,
                "tie_word_embeddings": True,
            }
        ),
        "group of 7, wide heads, one expert": Case(
            {
                "hidden_size": 42,
                "num_attention_heads": 14,
                "head_dim": 10,
                "num_local_experts": 3,
                "num_experts_per_tok": 1,
            }
        ),
        "devices share out 4 experts": Case({**FOUR_HEADS, "num_local_experts": 4}),
        "devices split the width of 5 experts": Case(FOUR_HEADS),
    }
    text_cases = ("group of 3, windows",)
    parallel_cases = ("devices share out 4 experts", "devices split the width of 5 experts")
    full_sizes = {
        "Mixtral-8x7B": FullSize(
            {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "max_position_embeddings": 32768,
            },
            46_702_792_704,
        ),
        "Mixtral-8x22B": FullSize(
            {
                "vocab_size": 32000,
                "hidden_size": 6144,
                "intermediate_size": 16384,
                "num_hidden_layers": 56,
                "num_attention_heads": 48,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "max_position_embeddings": 65536,
            },
            140_620_634_112,
        ),
    }


def test_what_config_json_leaves_out_is_as_in_transformers() -> None:
    config = mixtral.config(
        {
            **{key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        }
    )
    attention = config.layers[0].attention
    assert attention.rope is not None
    assert (attention.rope.theta, attention.sliding_window) == (1e6, None)
    assert config.layers[0].norm.eps == 1e-5
    assert config.layers[0].ffn.router == RouterSpec(2, normalize=True)
