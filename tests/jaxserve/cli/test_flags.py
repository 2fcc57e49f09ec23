"""Flags follow the dataclasses that they fill."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.__main__ import make_parser
from jaxserve.cli import flags
from jaxserve.cli.interrupt import Stopped, interruptible
from jaxserve.config import EngineConfig
from jaxserve.sampling.params import SamplingParams


def parse(*words: str) -> flags.Namespace:
    """The values of ``jaxserve generate``."""
    return make_parser().parse_args(flags.with_dashes(["generate", *words])).generate


def test_flags_of_both_spellings_fill_the_dataclasses() -> None:
    args = parse(
        *("a prompt", "some/model", "--max_model_len", "64", "--max-num-seqs=4", "-tp", "2"),
        *("--no-enable-prefix-caching", "--enforce_eager", "--top_p=0.5", "--ignore-eos"),
        *("--stop", "END", "--stop", "_x_", "--stop-token-ids", "3", "--seed", "7"),
    )
    config = EngineConfig(**flags.engine_arguments(args))
    wanted = {
        "model": "some/model",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "tensor_parallel_size": 2,
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    assert config == EngineConfig(**wanted)
    assert flags.sampling_arguments(args) == {
        "top_p": 0.5,
        "ignore_eos": True,
        "stop": ["END", "_x_"],
        "stop_token_ids": [3],
        "seed": 7,
        "max_tokens": 256,
    }


def test_without_flags_the_defaults_hold() -> None:
    args = parse("--model", "m")
    assert EngineConfig(**flags.engine_arguments(args)) == EngineConfig(model="m")
    assert flags.sampling_arguments(args) == {"max_tokens": 256}
    assert args.prompt is None


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_field_has_a_flag_or_a_reason(cls: type) -> None:
    hidden = flags.ENGINE_HIDDEN | flags.SAMPLING_HIDDEN
    texts, values = flags.summaries(cls), parse()
    for field in dataclasses.fields(cls):
        if field.name not in hidden:
            assert texts[field.name].strip() and field.name in values


def test_underscores_after_a_lone_double_dash_or_in_values_stay() -> None:
    words = ["generate", "--max_tokens=1", "--model", "a_b", "--stop=a_b", "--", "--my_prompt"]
    assert flags.with_dashes(words) == [
        *("generate", "--max-tokens=1", "--model", "a_b", "--stop=a_b", "--", "--my_prompt")
    ]


def test_a_yaml_file_gives_flags_and_the_command_line_overrides_it(tmp_path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("max_model_len: 32\ntemperature: 0.5\n")
    args = parse("--config", str(file), "--temperature", "0.7")
    assert (args.max_model_len, args.temperature) == (32, 0.7)


def test_ctrl_c_stops_at_the_next_check_and_the_second_one_at_once() -> None:
    with interruptible() as interrupt:
        interrupt.check()
        interrupt.press(2, None)
        with pytest.raises(Stopped):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            interrupt.press(2, None)
