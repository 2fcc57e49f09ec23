"""vLLM's arguments: ours, without effect, only at their defaults, or unknown."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from jaxserve import LLM
from jaxserve.compat import FIXED, NO_OPS, engine_config
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

FIELDS = {field.name for field in dataclasses.fields(EngineConfig)}


def test_our_own_arguments_pass_through() -> None:
    config = engine_config("some/model", {"max_num_seqs": 3, "dtype": "half"})
    assert config == EngineConfig(model="some/model", max_num_seqs=3, dtype="half")


@pytest.mark.parametrize("name", NO_OPS)
def test_arguments_without_effect_are_logged_with_the_reason(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jaxserve"):
        assert engine_config(None, {name: 7}) == EngineConfig()
    assert f"{name} has no effect here: {NO_OPS[name]}." in caplog.text


def test_trust_remote_code_is_accepted_and_said_to_be_needless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True}
    with (
        caplog.at_level(logging.INFO, "jaxserve"),
        LLM(trust_remote_code=True, use_tqdm=False, num_gpu_blocks_override=16, **settings),
    ):
        pass
    lines = [line for line in caplog.messages if "trust_remote_code" in line]
    assert len(lines) == 1
    assert "the models are jaxserve's own code" in lines[0]


@pytest.mark.parametrize("name", FIXED)
def test_some_arguments_are_accepted_at_their_default_only(name: str) -> None:
    assert engine_config(None, {name: FIXED[name]}) == EngineConfig()
    with pytest.raises(ConfigError, match=f"{name}='other' is not supported; only"):
        engine_config(None, {name: "other"})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("blocksize", "block_size"),
        ("swapspace", "swap_space"),
        ("quantisation", "quantization"),
    ],
)
def test_the_nearest_name_is_suggested(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        engine_config(None, {name: 1})
    assert str(error.value) == f"LLM has no argument {name!r}. Did you mean {nearest}?"


def test_nothing_is_suggested_for_a_name_unlike_any() -> None:
    with pytest.raises(ConfigError) as error:
        engine_config(None, {"zzzz": 1})
    assert str(error.value) == "LLM has no argument 'zzzz'."


def test_no_name_means_two_things() -> None:
    assert not FIELDS & NO_OPS.keys()
    assert not FIELDS & FIXED.keys()
    assert not NO_OPS.keys() & FIXED.keys()
