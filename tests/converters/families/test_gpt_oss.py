"""gpt-oss, with experts in MXFP4, as it is published, and in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.families import gpt_oss
from jaxserve.errors import CheckpointError, UnsupportedModelError
from tests.helpers.families import (
    ORIGINAL,
    Case,
    FamilyTests,
    FullSize,
    HuggingFace,
    Save,
    Shapes,
    Tensors,
)

SMALL = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 20,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
YARN = {**SMALL["rope_parameters"], "factor": 32.0, "original_max_position_embeddings": 4096}
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def is_packed(name: str) -> bool:
    return name.endswith(("gate_up_proj", "down_proj"))


def packed(shapes: Shapes) -> Shapes:
    """The published shapes: of the experts, whose matrices transformers turns, the codes."""
    published: Shapes = {}
    for name, shape in shapes.items():
        if is_packed(name):
            count, inputs, outputs = shape
            published[f"{name}_scales"] = (count, outputs, inputs // 32)
            published[f"{name}_blocks"] = (count, outputs, inputs // 32, 16)
        else:
            published[name] = shape
    return published


class Quantized(HuggingFace):
    """With random codes for experts; transformers reads what its own function makes of them."""

    def write(
        self, directory: Path, config: Mapping[str, Any], seed: int, dtype: str, save: Save
    ) -> None:
        import torch
        from safetensors.numpy import save_file
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        rng = np.random.default_rng(seed)
        made: list[tuple[dict[str, Any], Tensors]] = []
        super().write(directory, config, seed, dtype, lambda *both: made.append(both))
        written, tensors = made[0]
        plain, published = dict(tensors), dict(tensors)
        for name in filter(is_packed, tensors):
            count, inputs, outputs = published.pop(name).shape
            scales = rng.integers(121, 125, (count, outputs, inputs // 32), np.uint8)
            blocks = rng.integers(0, 256, (*scales.shape, 16), np.uint8)
            published |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            codes = torch.from_numpy(blocks), torch.from_numpy(scales)
            plain[name] = convert_moe_packed_tensors(*codes, dtype=torch.float32).numpy()
        (directory / ORIGINAL).mkdir()
        save_file(plain, directory / ORIGINAL / "model.safetensors", {"format": "pt"})
        (directory / ORIGINAL / "config.json").write_text(json.dumps(written))
        save(written | {"quantization_config": QUANTIZATION}, published)


class TestGptOss(FamilyTests):
    oracle = Quantized("GptOssConfig", SMALL, published=packed)
    cases = {
        "group of 3": Case(prompt_len=70),
        "group of 1, tied, no biases": Case(
            {"num_key_value_heads": 6, "tie_word_embeddings": True, "attention_bias": False}
        ),
        "group of 7, windows last": Case(
            {
                "num_attention_heads": 14,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            40,
        ),
        "devices share out 4 experts": Case({**FOUR_HEADS, "num_local_experts": 4}),
        "devices split the width of 5 experts": Case(FOUR_HEADS),
    }
    text_cases = ("group of 3",)
    parallel_cases = ("devices share out 4 experts", "devices split the width of 5 experts")
    full_sizes = {
        name: FullSize(
            {
                "vocab_size": 201088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": layers,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": experts,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "max_position_embeddings": 131072,
                "rope_parameters": YARN,
            },
            parameters,
        )
        for name, layers, experts, parameters in (
            ("gpt-oss-20b", 24, 32, 20_914_757_184),
            ("gpt-oss-120b", 36, 128, 116_829_156_672),
        )
    }

    def test_experts_in_plain_numbers_are_read_too(self, tmp_path: Path) -> None:
        """As transformers writes them: inputs before outputs."""
        plain = type("Plain", (FamilyTests,), {"oracle": HuggingFace("GptOssConfig", SMALL)})
        plain.cases = {"plain": Case({"intermediate_size": 50})}
        plain()._check_logits(plain().make(tmp_path, "plain"), 24)


def test_the_published_config() -> None:
    """In the spelling of the published file, which transformers 5 writes differently."""
    theta, yarn = YARN["rope_theta"], {k: v for k, v in YARN.items() if k != "rope_theta"}
    settings = {"rope_parameters": None, "rope_scaling": yarn, "rope_theta": theta}
    length = {"max_position_embeddings": 131072, "quantization_config": QUANTIZATION}
    config = gpt_oss.config({**SMALL, **settings, **length})
    assert config == gpt_oss.config({**SMALL, "rope_parameters": YARN, **length})
    assert config.max_model_len == 131072
    assert [layer.attention.sliding_window for layer in config.layers] == [20, None]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("swiglu_limit", 5.0, "swiglu_limit other than 7.0 is not supported"),
        ("swiglu_alpha", 1.0, "swiglu_alpha other than 1.702 is not supported"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config is set, but"),
        ("layer_types", ["chunked_attention"] * 2, "layer_types has chunked_attention"),
    ],
)
def test_what_we_do_not_have_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        gpt_oss.config({**SMALL, key: value})


def test_a_rope_must_be_there() -> None:
    """Without one, transformers takes that of gpt-oss; we take none for granted."""
    with pytest.raises(CheckpointError, match="rope_scaling is missing"):
        gpt_oss.config({**SMALL, "rope_parameters": None})
