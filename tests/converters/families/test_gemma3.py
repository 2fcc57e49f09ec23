"""Gemma 3: the text part of the models with vision."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import open_checkpoint
from converters.families import gemma3
from jaxserve.errors import UnsupportedModelError
from tests.converters.families.test_gemma3_text import SMALL as SMALL_TEXT
from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace, write_checkpoint

SMALL_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
SMALL = {"text_config": SMALL_TEXT, "vision_config": SMALL_VISION, "mm_tokens_per_image": 4}
LINEAR = {"rope_type": "linear", "factor": 8.0}
GEMMA_3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "sliding_window": 1024,
    "rope_scaling": LINEAR,
}


def published_name(name: str) -> str:
    """What the published files call a tensor of transformers' module."""
    name = name.replace("model.language_model.", "language_model.model.")
    return name.removeprefix("model.")


def published(tensors: dict[str, Any]) -> dict[str, Any]:
    return {published_name(name): tensor for name, tensor in tensors.items()}


def rewrite(config: dict[str, Any], tensors: dict) -> tuple[dict[str, Any], dict]:
    """The published names, and config.json as it was before transformers 5."""
    text = dict(config["text_config"])
    ropes = text.pop("rope_parameters")
    text["rope_theta"] = ropes["full_attention"].pop("rope_theta")
    text["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    text["rope_scaling"] = ropes["full_attention"]
    text["sliding_window_pattern"] = 2
    del text["layer_types"]
    return config | {"text_config": text}, published(tensors)


class TestGemma3(FamilyTests):
    oracle = HuggingFace("Gemma3Config", SMALL, rewrite=rewrite, published=published)
    cases = {
        "group of 3, windows, linear rope": Case({}, 40),
        "4 KV heads": Case(
            {"text_config": SMALL_TEXT | {"num_attention_heads": 4, "num_key_value_heads": 4}}
        ),
    }
    text_cases = ("group of 3, windows, linear rope",)
    parallel_cases = ("4 KV heads",)
    prompt_lens = (2, 3, 5, 9, 30, 75, 130)
    full_sizes = {
        name: FullSize({"text_config": text, "vision_config": SIGLIP}, parameters)
        for name, text, parameters in (
            ("gemma-3-4b", GEMMA_3_4B, 3_880_263_168),
            (
                "gemma-3-12b",
                {
                    **GEMMA_3_4B,
                    "hidden_size": 3840,
                    "intermediate_size": 15360,
                    "num_attention_heads": 16,
                    "num_hidden_layers": 48,
                    "num_key_value_heads": 8,
                },
                11_766_034_176,
            ),
            (
                "gemma-3-27b",
                {
                    **GEMMA_3_4B,
                    "head_dim": 128,
                    "hidden_size": 5376,
                    "intermediate_size": 21504,
                    "num_attention_heads": 32,
                    "num_hidden_layers": 62,
                    "num_key_value_heads": 16,
                    "query_pre_attn_scalar": 168,
                },
                27_009_346_304,
            ),
        )
    }

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("gemma-3-4b", 4_300_079_472),
            ("gemma-3-12b", 12_187_325_040),
            ("gemma-3-27b", 27_432_406_640),
        ],
    )
    def test_with_its_vision_tensors_it_has_the_published_number_of_parameters(
        self, name: str, parameters: int
    ) -> None:
        shapes = self.oracle.shapes(self.oracle.config(self.full_sizes[name].settings))
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
        assert {tensor.split(".")[0] for tensor in shapes} == {
            "language_model",
            "vision_tower",
            "multi_modal_projector",
        }

    @pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
    def test_files_as_transformers_5_writes_them_load_as_well(
        self, prefix: str, tmp_path: Path
    ) -> None:
        """Whichever names it writes; those of its modules are valid too."""

        def rename(config: dict, tensors: dict) -> tuple[dict, dict]:
            names = {name: published_name(name) for name in tensors}
            return config, {
                new.replace("language_model.model.", prefix): tensors[old]
                for old, new in names.items()
            }

        oracle = dataclasses.replace(self.oracle, rewrite=rename)
        directory = write_checkpoint(oracle, tmp_path / "model", oracle.config({}))
        assert any(name.startswith(prefix) for name in open_checkpoint(directory).open_tensors())
        self._check_logits(directory, 40)


PUBLISHED = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": GEMMA_3_4B,
    "vision_config": SIGLIP,
    "torch_dtype": "bfloat16",
}


def test_the_published_config_says_little_and_means_this(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "jaxserve"):
        config = gemma3.config(PUBLISHED)
    assert "images aren't supported yet" in caplog.text
    assert (config.vocab_size, config.max_model_len) == (262208, 131072)
    assert (config.dtype, config.tie_word_embeddings) == ("bfloat16", True)
    windows = [layer.attention.sliding_window for layer in config.layers]
    assert windows == ([1024] * 5 + [None]) * 5 + [1024] * 4
    local, everything = (config.layers[index].attention.rope for index in (0, 5))
    assert (local.theta, local.scaling) == (1e4, None)
    assert (everything.theta, everything.scaling.kind, everything.scaling.factor) == (
        1e6,
        "linear",
        8.0,
    )
    attention = config.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_size) == (8, 4, 256)


def test_what_its_text_part_cannot_do_is_refused_by_name() -> None:
    for key, value in (("use_bidirectional_attention", True), ("attn_logit_softcapping", 50.0)):
        with pytest.raises(UnsupportedModelError, match=f"text_config: {key}"):
            gemma3.config(PUBLISHED | {"text_config": GEMMA_3_4B | {key: value}})
