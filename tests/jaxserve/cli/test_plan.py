"""What a model would take, told from its config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.__main__ import main

GIB = 2**30
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main(["plan", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_large_model_over_four_devices(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(llama), "-tp", "4", "--max-model-len", "32K", "--device-memory", "80"]
    plan = plan_of(capsys, *words)
    assert plan["parameters"] == 70_553_706_496
    assert plan["weights"] == 2 * 70_553_706_496
    assert plan["device_weights"] == pytest.approx(plan["weights"] / 4, rel=1e-3)
    assert plan["token"] == 2 * 80 * 8 * 128 * 2
    assert plan["device_sequence"] == 32768 * plan["token"] // 4
    room = 0.9 * 80 * GIB - plan["device_weights"] - plan["device_activations"]
    assert plan["sequences"] == int(room / plan["device_sequence"])
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert "70.55 billion" in text and f"{plan['sequences']} sequences of 32,768 tokens" in text


def test_a_model_that_does_not_fit(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(llama), "-tp", "2", "--device-memory", "80"]) == 1
    assert "two" not in (text := capsys.readouterr().out) and "--max-model-len" in text
    assert main(["plan", str(llama), "--device-memory", "80"]) == 1
    assert "--tensor-parallel-size" in capsys.readouterr().out


def test_without_an_accelerator_it_says_what_is_needed(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(llama), "-tp", "8"]) == 0
    text = capsys.readouterr().out
    assert "needed for one sequence" in text and "--device-memory" in text


def test_windows_make_long_sequences_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LLAMA_70B | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    sizes = []
    for window in (None, 4096):
        (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
        sizes.append(plan_of(capsys, str(tmp_path), "-tp", "8")["device_sequence"])
    # 4096 tokens are seen, and three steps of 8192 may be under way.
    assert sizes[1] / sizes[0] == pytest.approx((4096 + 3 * 8192 + 16) / 131072)


def test_heads_that_cannot_be_split_are_told(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(llama), "-tp", "3"]) == 1
    assert "use 1, 2, 4, 8" in capsys.readouterr().err
