"""ModelConfig as JSON, and what it says about positions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from converters import open_checkpoint
from jaxserve import demo
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeScaling,
    RopeSpec,
)
from tests.helpers.checkpoints import CASES, make_checkpoint


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    directory = tmp_path_factory.mktemp("checkpoints")
    paths: dict[str, Path] = {case: make_checkpoint(directory / case, case) for case in CASES}
    paths["demo"] = demo.target_path()
    return {name: open_checkpoint(path).config for name, path in paths.items()}


@pytest.mark.parametrize("name", [*CASES, "demo"])
def test_json_round_trip(name: str, configs: dict[str, ModelConfig]) -> None:
    config = configs[name]
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)  # it is a static argument of compiled functions
    assert again.rope_specs == config.rope_specs
    assert json.loads(config.to_json())["layers"][0]["norm"]["eps"] == config.layers[0].norm.eps


def test_layers_alike_share_their_rope_spec(configs: dict[str, ModelConfig]) -> None:
    assert len(configs["llama-gqa"].rope_specs) == 1
    assert configs["opt-125m"].rope_specs == ()


def test_rope_specs_are_in_order_of_first_use() -> None:
    norm = NormSpec("rms", 1e-6)
    specs = [RopeSpec(theta, 8) for theta in (3.0, 2.0, 3.0, 4.0)]
    layers = tuple(
        LayerSpec(AttentionSpec(1, 1, 8, 1.0, rope=spec), MLPSpec(8, "silu"), norm)
        for spec in [*specs, None]
    )
    config = ModelConfig("Test", 10, 8, 64, layers, norm, False, 8)
    assert [spec.theta for spec in config.rope_specs] == [3.0, 2.0, 4.0]
    assert config.dynamic_rope_len is None
    dynamic = RopeSpec(3.0, 8, RopeScaling("dynamic", 2.0, 32))
    changed = dataclasses.replace(
        layers[0], attention=dataclasses.replace(layers[0].attention, rope=dynamic)
    )
    changed_config = dataclasses.replace(config, layers=(*layers, changed))
    assert (changed_config.dynamic_rope_len, changed_config.long_rope_len) == (32, None)
