"""Qwen 1, against arithmetic written from modeling_qwen.py's description."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import families, open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.tokenizer import Tokenizer
from tests.helpers import qwen_vocab
from tests.helpers.arithmetic import attend, rms_norm, rotate, silu
from tests.helpers.conversations import conversation
from tests.helpers.families import Arithmetic, Case, FamilyTests, FullSize, Shapes, Tensors
from tests.helpers.models_doc import CHAT

SMALL = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "vocab_size": 259,
    "hidden_size": 40,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "kv_channels": 8,
    "max_position_embeddings": 256,
    "seq_length": 24,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}
LAYER = "transformer.h.{}."


def shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    width = config["intermediate_size"] // 2
    names: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        layer: Shapes = {
            "ln_1.weight": (hidden,),
            "attn.c_attn.weight": (3 * hidden, hidden),
            "attn.c_attn.bias": (3 * hidden,),
            "attn.c_proj.weight": (hidden, hidden),
            "ln_2.weight": (hidden,),
            "mlp.w1.weight": (width, hidden),
            "mlp.w2.weight": (width, hidden),
            "mlp.c_proj.weight": (hidden, width),
        }
        if not config["no_bias"]:
            biases = {"attn.c_proj": hidden, "mlp.w1": width, "mlp.w2": width, "mlp.c_proj": hidden}
            layer |= {f"{name}.bias": (size,) for name, size in biases.items()}
        names |= {LAYER.format(index) + name: shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = (vocab, hidden)
    return names


def frequencies(config: Mapping[str, Any], prompt_len: int) -> np.ndarray:
    size = int(config["kv_channels"] * config["rotary_pct"])
    alpha = 2 ** math.ceil(math.log2(prompt_len / config["seq_length"]) + 1) - 1
    alpha = max(alpha, 1) if config["use_dynamic_ntk"] else 1
    base = config["rotary_emb_base"] * alpha ** (size / (size - 2))
    return base ** -(np.arange(0, size, 2) / size)


def forward(
    config: Mapping[str, Any], tensors: Tensors, token_ids: Sequence[int], prompt_len: int
) -> np.ndarray:
    heads, eps = config["num_attention_heads"], config["layer_norm_epsilon"]
    trained, length = config["seq_length"], len(token_ids)
    turns = frequencies(config, prompt_len)
    places = np.arange(1, length + 1)
    growth = np.where(places > trained, np.log(places) / np.log(trained), 1.0)[:, None, None]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    x = tensors["transformer.wte.weight"][list(token_ids)].astype(np.float64)
    for index in range(config["num_hidden_layers"]):
        here = LAYER.format(index)
        h = rms_norm(x, tensors[f"{here}ln_1.weight"], eps)
        q, k, v = np.split(linear(h, f"{here}attn.c_attn"), 3, -1)
        q, k, v = (each.reshape(length, heads, -1) for each in (q, k, v))
        q, k = rotate(q, turns), rotate(k, turns)
        q = q * growth if config["use_logn_attn"] else q
        x = x + linear(attend(q, k, v), f"{here}attn.c_proj")
        h = rms_norm(x, tensors[f"{here}ln_2.weight"], eps)
        h = linear(h, f"{here}mlp.w1") * silu(linear(h, f"{here}mlp.w2"))
        x = x + linear(h, f"{here}mlp.c_proj")
    x = rms_norm(x, tensors["transformer.ln_f.weight"], eps)
    return x @ tensors.get("lm_head.weight", tensors["transformer.wte.weight"]).T


def size(hidden: int, width: int, layers: int, vocab: int = 151936) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "kv_channels": 128,
        "vocab_size": vocab,
        "seq_length": 8192,
        "max_position_embeddings": 32768,
    }


class TestQwen(FamilyTests):
    oracle = Arithmetic(SMALL, shapes, forward)
    cases = {
        "a prompt within the trained length": Case(),
        "a prompt of five times the trained length": Case(prompt_len=120),
        "tied, with biases": Case({"tie_word_embeddings": True, "no_bias": False}),
        "half the features rotated": Case({"rotary_pct": 0.5}, 60),
        "neither stretched nor grown": Case(
            {"use_dynamic_ntk": False, "use_logn_attn": False, "seq_length": 64}, 60
        ),
        "4 heads": Case({"num_attention_heads": 4, "hidden_size": 32}),
    }
    text_cases = ("a prompt within the trained length",)
    parallel_cases = ("4 heads",)
    full_sizes = {
        "Qwen-1_8B": FullSize(size(2048, 11008, 24), 1_836_828_672),
        "Qwen-7B": FullSize(size(4096, 22016, 32), 7_721_324_544),
        "Qwen-14B": FullSize(
            size(5120, 27392, 40, 152064) | {"seq_length": 2048, "max_position_embeddings": 8192},
            14_167_290_880,
        ),
        "Qwen-72B": FullSize(
            size(8192, 49152, 80, 152064)
            | {"rotary_emb_base": 1000000, "seq_length": 32768, "use_dynamic_ntk": False},
            72_287_920_128,
        ),
    }


def test_the_longest_sequence_needs_the_stretched_rope() -> None:
    stretched = SMALL | {"max_position_embeddings": 32768, "seq_length": 8192}
    assert families.find(SMALL).config(stretched).max_model_len == 32768
    assert families.find(SMALL).config(stretched | {"use_dynamic_ntk": False}).max_model_len == 8192


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"visual": {"heads": 16}}, UnsupportedModelError, "visual is set"),
        ({"audio": {"n_mels": 80}}, UnsupportedModelError, "audio is set"),
        ({"kv_channels": 16}, CheckpointError, "kv_channels is 16"),
        ({"rotary_pct": 0.4}, CheckpointError, "rotary_pct is 3"),
        ({"hidden_size": None}, CheckpointError, "hidden_size is missing"),
    ],
)
def test_other_arithmetic_is_refused(change: dict[str, Any], error: type, word: str) -> None:
    with pytest.raises(error, match=word):
        families.find(SMALL).config(SMALL | change)


@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        ({"chat_format": "chatml", "eos_token_id": 256}, (256, 257, 258)),
        ({"chat_format": "raw", "eos_token_id": 256}, (256,)),
        ({}, (256,)),
    ],
)
def test_chat_models_end_their_turns(
    tmp_path: Path, generation: dict[str, Any], ends: tuple[int, ...]
) -> None:
    """generation_config.json names <|endoftext|> only; the format ends turns with <|im_end|>."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(tmp_path, "dummy").eos_token_ids == ends


def test_a_conversation_has_the_tokens_of_the_familys_own_code(
    tmp_path: Path, family: Callable[..., None]
) -> None:
    tokenizer = Tokenizer(str(qwen_vocab.write(tmp_path, chat_format="chatml")))
    history, query, system = [("你好", "Hi")], "1 + 1?<|im_end|>", "Be brief."
    messages = conversation(history, query, system)
    _, ids = tokenizer.chat(messages, add_generation_prompt=True)
    assert ids == qwen_vocab.published_context(query, history, system, 6144)
    family(SMALL["architectures"][0], CHAT, "own code")


def test_code_of_the_checkpoint_is_named_and_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "modeling_qwen.py").write_text("raise SystemExit('code was run')")
    with caplog.at_level("INFO", "jaxserve"):
        for _ in range(2):
            open_checkpoint(tmp_path, "dummy")
    assert caplog.text.count("names Python code of its own for its model") == 1
