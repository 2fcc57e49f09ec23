"""Gemma 2."""

from __future__ import annotations

import pytest

from converters.families import gemma2
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
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "max_position_embeddings": 512,
}
"""Caps so low that they bend most scores and logits."""
GEMMA_2_2B = {
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


class TestGemma2(FamilyTests):
    oracle = HuggingFace("Gemma2Config", SMALL)
    cases = {
        "group of 3, windows": Case({}, 40),
        "group of 1, untied, biases, no caps": Case(
            {
                "num_key_value_heads": 6,
                "tie_word_embeddings": False,
                "attention_bias": True,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            }
        ),
        "group of 7, full attention first": Case(
            {
                "hidden_size": 42,
                "num_attention_heads": 14,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            40,
        ),
        "4 KV heads": Case({"num_attention_heads": 4, "num_key_value_heads": 4}),
    }
    text_cases = ("group of 3, windows",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "gemma-2-2b": FullSize(GEMMA_2_2B, 2_614_341_888),
        "gemma-2-9b": FullSize(
            {
                **GEMMA_2_2B,
                "hidden_size": 3584,
                "intermediate_size": 14336,
                "num_hidden_layers": 42,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
            9_241_705_984,
        ),
        "gemma-2-27b": FullSize(
            {
                **GEMMA_2_2B,
                "hidden_size": 4608,
                "intermediate_size": 36864,
                "num_hidden_layers": 46,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "query_pre_attn_scalar": 144,
            },
            27_227_128_320,
        ),
    }


PUBLISHED = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **GEMMA_2_2B}


def test_the_published_config_means_what_it_says() -> None:
    config = gemma2.config(PUBLISHED)
    windows = [layer.attention.sliding_window for layer in config.layers]
    assert windows == [4096, None] * 13
    attention = config.layers[0].attention
    assert (attention.scale, attention.softcap) == (1 / 16, 50.0)
    assert (config.embedding_scale, config.logit_softcap) == (48.0, 30.0)
    assert config.tie_word_embeddings
    without = {key: PUBLISHED[key] for key in PUBLISHED if "softcapping" not in key}
    assert gemma2.config(without) == config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional"),
        ({"sliding_window": None}, CheckpointError, "sliding_window is missing"),
        ({"hidden_activation": "xielu"}, UnsupportedModelError, "hidden_activation='xielu'"),
        ({"layer_types": ["full_attention"]}, CheckpointError, "each of 26 layers"),
        ({"query_pre_attn_scalar": 0}, CheckpointError, "query_pre_attn_scalar is 0"),
        ({"attn_logit_softcapping": -1}, CheckpointError, "attn_logit_softcapping is -1"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gemma2.config(PUBLISHED | changes)
