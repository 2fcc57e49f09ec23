"""ChatGLM2, ChatGLM3 and GLM-4-9B as first published. transformers has no such model, so the oracle
is the published description in numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import open_checkpoint
from converters.families import chatglm
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.tokenizer import Tokenizer
from tests.helpers import chatglm_vocab
from tests.helpers.conversations import conversation
from tests.helpers.families import Arithmetic, Case, FamilyTests, FullSize, Shapes, Tensors
from tests.helpers.models_doc import CHAT

CHATGLM3_6B = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM_4_9B = {
    **CHATGLM3_6B,
    "layernorm_epsilon": 1.5625e-07,
    "num_layers": 40,
    "padded_vocab_size": 151552,
    "rope_ratio": 500,
    "seq_length": 131072,
    "torch_dtype": "bfloat16",
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
SMALL = {
    **CHATGLM3_6B,
    "padded_vocab_size": 259,
    "hidden_size": 36,
    "ffn_hidden_size": 56,
    "num_layers": 2,
    "num_attention_heads": 6,
    "kv_channels": 12,
    "seq_length": 512,
}


def shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a checkpoint."""
    hidden, ffn, size = (config[key] for key in ("hidden_size", "ffn_hidden_size", "kv_channels"))
    queries = config["num_attention_heads"] * size
    qkv = queries + 2 * config["multi_query_group_num"] * size
    vocab, biases = config["padded_vocab_size"], config["add_bias_linear"]
    tensors: Shapes = {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        "transformer.rotary_pos_emb.inv_freq": (size // 4,),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        for name, (outputs, inputs), bias in (
            ("self_attention.query_key_value", (qkv, hidden), biases or config["add_qkv_bias"]),
            ("self_attention.dense", (hidden, queries), biases),
            ("mlp.dense_h_to_4h", (2 * ffn, hidden), biases),
            ("mlp.dense_4h_to_h", (hidden, ffn), biases),
        ):
            tensors[f"{layer}.{name}.weight"] = (outputs, inputs)
            if bias:
                tensors[f"{layer}.{name}.bias"] = (outputs,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = (hidden,)
    return tensors


def rms_norm(config: Mapping[str, Any], x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [T, hidden] over the root of its mean square."""
    square = np.mean(x * x, -1, keepdims=True) + config["layernorm_epsilon"]
    return x / np.sqrt(square) * weight


def rotate(config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """Turns neighbours in the first half of each head: x [T, heads, size]."""
    rotated = x.shape[-1] // 2
    base, places, ratio = 10000.0, np.arange(len(x)), config.get("rope_ratio", 1)
    if "chatglm2" in config.get("_name_or_path", ""):
        places = places / ratio
    else:
        base *= ratio
    angles = np.outer(places, base ** (-np.arange(0, rotated, 2) / rotated))[:, None]
    even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
    out = x.copy()
    out[..., 0:rotated:2] = even * np.cos(angles) - odd * np.sin(angles)
    out[..., 1:rotated:2] = odd * np.cos(angles) + even * np.sin(angles)
    return out


def attention(config: Mapping[str, Any], qkv: np.ndarray) -> np.ndarray:
    """[T, (heads + 2 * groups) * size] -> [T, heads * size]; a group's queries share its key."""
    length, size = len(qkv), config["kv_channels"]
    heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
    parts = np.split(qkv.reshape(length, -1, size), [heads, heads + groups], axis=1)
    q, k = rotate(config, parts[0]), rotate(config, parts[1])
    k, v = (np.repeat(each, heads // groups, axis=1) for each in (k, parts[2]))
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)


def forward(
    config: Mapping[str, Any], tensors: Tensors, token_ids: Sequence[int], prompt_len: int
) -> np.ndarray:
    """Logits [T, vocab]."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    x = tensors["transformer.embedding.word_embeddings.weight"][list(token_ids)]
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        h = rms_norm(config, x, tensors[f"{layer}.input_layernorm.weight"])
        h = attention(config, linear(f"{layer}.self_attention.query_key_value", h))
        x = x + linear(f"{layer}.self_attention.dense", h)
        h = rms_norm(config, x, tensors[f"{layer}.post_attention_layernorm.weight"])
        gate, up = np.split(linear(f"{layer}.mlp.dense_h_to_4h", h), 2, axis=-1)
        x = x + linear(f"{layer}.mlp.dense_4h_to_h", gate / (1 + np.exp(-gate)) * up)
    x = rms_norm(config, x, tensors["transformer.encoder.final_layernorm.weight"])
    return linear("transformer.output_layer", x)


class TestChatGLM(FamilyTests):
    oracle = Arithmetic(SMALL, shapes, forward)
    cases = {
        "group of 3": Case(),
        "group of 1, biases everywhere": Case(
            {"multi_query_group_num": 6, "add_bias_linear": True, "add_qkv_bias": False}
        ),
        "group of 7, slow rotation": Case(
            {
                "num_attention_heads": 14,
                "architectures": ["ChatGLMForConditionalGeneration"],
                "_name_or_path": "THUDM/chatglm3-6b-32k",
                "rope_ratio": 50,
                "layernorm_epsilon": 1.5625e-07,
            }
        ),
        "ChatGLM2, positions divided": Case(
            {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16}
        ),
        "4 KV heads, no biases": Case(
            {"num_attention_heads": 4, "multi_query_group_num": 4, "add_qkv_bias": False}
        ),
    }
    text_cases = ("group of 3",)
    parallel_cases = ("4 KV heads, no biases",)
    full_sizes = {
        "chatglm3-6b": FullSize(CHATGLM3_6B, 6_243_584_000),
        "chatglm2-6b": FullSize({**CHATGLM3_6B, "seq_length": 8192}, 6_243_584_000),
        "glm-4-9b-chat": FullSize(GLM_4_9B, 9_399_951_360),
        "glm-4-9b-chat-1m": FullSize(
            {
                **GLM_4_9B,
                "multi_query_group_num": 4,
                "rope_ratio": 10000,
                "seq_length": 1048576,
            },
            9_483_857_920,
        ),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"rmsnorm": False},
        {"post_layer_norm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"multi_query_attention": False},
        {"multi_query_attention": None},
        {"original_rope": False},
        {"tie_word_embeddings": True},
        {"interleaved_qkv": True},
        {"quantization_bit": 4},
        {"rotary_percent": 0.25},
        {"pre_seq_len": 128},
        {"vision_config": {"hidden_size": 8}},
        {"position_encoding_2d": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_arithmetic_is_refused(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(UnsupportedModelError, match=key):
        chatglm.config({**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_channels": 10}, "kv_channels is 10; expected a multiple of 4"),
        ({"multi_query_group_num": 4}, "num_attention_heads=6 is no multiple of"),
        ({"padded_vocab_size": None}, "padded_vocab_size is missing"),
    ],
    ids=("kv_channels", "groups", "vocabulary"),
)
def test_values_without_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        chatglm.config({**SMALL, **change})


@pytest.mark.parametrize("name", [None, "/models/mine", "/chatglm2-to-chatglm3"])
def test_a_rope_ratio_of_either_meaning_is_refused(name: str | None) -> None:
    """ChatGLM2 divides positions by it, ChatGLM3 multiplies the base."""
    change = {"_name_or_path": name, "rope_ratio": 50}
    with pytest.raises(UnsupportedModelError, match="nothing here tells which of them this is"):
        chatglm.config(CHATGLM3_6B | change)
    assert chatglm.config(GLM_4_9B | change).rope_specs[0].theta == 500_000
    chatglm.config(CHATGLM3_6B | change | {"rope_ratio": 1})


@pytest.mark.parametrize("kind", chatglm_vocab.KINDS)
def test_a_conversation_has_the_tokens_of_the_familys_own_code(
    kind: str, tmp_path: Path, family: Callable[..., None]
) -> None:
    tokenizer = Tokenizer(chatglm_vocab.write_kind(tmp_path, kind))
    history, query = [("你好", "Hi")], "1 + 1?<|user|></s>"
    _, ids = tokenizer.chat(conversation(history, query), add_generation_prompt=True)
    assert ids == chatglm_vocab.published_prompt(kind, query, history)
    family("ChatGLMModel", CHAT, "own code")  # its other architecture name means the same


def test_settings_that_change_nothing_are_accepted() -> None:
    """CodeGeeX2 has some more of them."""
    config = chatglm.config({**SMALL, "rotary_percent": 0.5, "interleaved_qkv": False})
    assert config == chatglm.config(SMALL)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"padded_vocab_size": 65024, "eos_token_id": 2}, (2, 64795, 64797)),
        ({"padded_vocab_size": 70000, "eos_token_id": 2}, (2,)),
        ({"padded_vocab_size": 151552, "eos_token_id": [151329, 151336]}, (151329, 151336)),
    ],
    ids=("ChatGLM3", "its vocabulary extended", "GLM-4"),
)
def test_a_turn_ends_where_the_published_chat_ends_it(
    settings: dict[str, Any], ends: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | settings))
    assert open_checkpoint(tmp_path, "dummy").eos_token_ids == ends
