"""Tiny random Hugging Face checkpoints of every family, and transformers' logits for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Format = Literal["safetensors", "safetensors-sharded", "bin", "bin-sharded"]

VOCAB_SIZE = 263  # three special tokens, 256 bytes, four merges
SPECIALS = ["<pad>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def with_old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers 4 would have written: rope_theta and rope_scaling.type."""
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    return config


@dataclass(frozen=True)
class Case:
    """A model to make.

    Attributes:
        family: the model_type.
        settings: arguments of its transformers config class.
        rewrite: a last change to config.json.
        prompt_len: how many tokens show what is special about it.
    """

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    prompt_len: int = 24


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **settings}
    return {"rope_parameters": rope, "max_position_embeddings": 16}


_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "factor": 8.0,
}
_YARN = {"original_max_position_embeddings": 8, "factor": 3.0}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

CASES: dict[str, Case] = {
    "llama-gqa": Case("llama"),
    "llama-mha-tied": Case("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-bias": Case(
        "llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-head-dim": Case("llama", {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": Case("llama", _rope("linear"), prompt_len=40),
    "llama-dynamic": Case("llama", _rope("dynamic"), prompt_len=40),
    "llama-yarn": Case("llama", _rope("yarn", **_YARN), prompt_len=40),
    "llama-yarn-mscale": Case(
        "llama",
        _rope("yarn", mscale=0.7, mscale_all_dim=0.3, beta_fast=8, beta_slow=2, truncate=False),
        prompt_len=40,
    ),
    "llama-yarn-factor": Case("llama", _rope("yarn", attention_factor=1.3), prompt_len=40),
    "llama-llama3": Case("llama", _rope("llama3", **_LLAMA3), prompt_len=40),
    "llama-linear-old": Case("llama", _rope("linear"), with_old_rope_keys, 40),
    "llama-dynamic-old": Case("llama", _rope("dynamic"), with_old_rope_keys, 40),
    "llama-yarn-old": Case("llama", _rope("yarn", **_YARN), with_old_rope_keys, 40),
    "llama-llama3-old": Case("llama", _rope("llama3", **_LLAMA3), with_old_rope_keys, 40),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": Case("mistral", {"sliding_window": 5}),
    "qwen2-tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case("qwen2", _QWEN_WINDOW),
    "qwen2-layer-types": Case(
        "qwen2",
        {**_QWEN_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": Case("qwen3", {"head_dim": 16}),
    "qwen3-bias": Case("qwen3", {"head_dim": 8, "attention_bias": True, **_QWEN_WINDOW}),
    "opt-125m": Case("opt"),
    "opt-350m": Case("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-old": Case("opt", {"_remove_final_layer_norm": True, "enable_bias": False}),
    "opt-untied": Case("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}),
}
SCALED = [
    name
    for name, case in CASES.items()
    if "rope_parameters" in case.settings and case.rewrite is None
]
"""Names of those with scaled positions, under the keys of today."""


def _config(case: Case) -> Any:
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "opt": "OPT"}
    kind = getattr(transformers, f"{name.get(case.family, case.family.title())}Config")
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if case.family == "opt":
        settings |= {"ffn_dim": 56}
    else:
        settings |= {"intermediate_size": 56, "num_key_value_heads": 2}
    return kind(**settings | case.settings)


@functools.cache
def _model(case_name: str, seed: int) -> Any:
    """The float32 model, with every weight random: zero biases would hide mistakes."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(_config(CASES[case_name])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else 0.15 * noise)
    return model


def make_checkpoint(
    directory: Path,
    case: str = "llama-gqa",
    dtype: str = "float32",
    format: Format = "safetensors",
    seed: int = 0,
    tokenizer: bool = False,
) -> Path:
    """Writes the checkpoint of a named case and returns its directory.

    Args:
        directory: where to; made if missing.
        case: a key of ``CASES``.
        dtype: dtype of the saved weights: "float32", "bfloat16" or "float16".
        format: "-sharded" writes several files and an index.
        seed: of the weights.
        tokenizer: whether to write a byte-level BPE tokenizer with a chat template.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    model = _model(case, seed)
    weights = {
        name: weight.to(getattr(torch, dtype)) for name, weight in model.state_dict().items()
    }
    size = "20KB" if format.endswith("-sharded") else "1GB"
    if format.startswith("safetensors"):
        model.save_pretrained(directory, state_dict=weights, max_shard_size=size)
    else:
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        if model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        save_bin(directory, weights, shards=3 if format == "bin-sharded" else 1)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"dtype": dtype}
    rewrite = CASES[case].rewrite
    path.write_text(json.dumps(config if rewrite is None else rewrite(config), indent=2))
    if tokenizer:
        write_tokenizer(directory)
    return directory


def save_bin(directory: Path, weights: dict[str, Any], shards: int) -> None:
    """What save_pretrained(safe_serialization=False) wrote before transformers 5."""
    import torch

    if shards == 1:
        torch.save(weights, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(list(weights.items())[shard::shards])
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "pytorch_model.bin.index.json").write_text(index)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE with four merges: tokenizer.json and tokenizer_config.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a")]
    tokens = SPECIALS + alphabet + ["".join(merge) for merge in merges]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[0],
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def prompt(case: str, seed: int = 0) -> list[int]:
    """Random token ids, as many as the case asks for."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, VOCAB_SIZE, CASES[case].prompt_len).tolist()


def reference_logits(path: Path, token_ids: list[int]) -> np.ndarray:
    """transformers' float32 logits [T, vocab] for the checkpoint."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()
