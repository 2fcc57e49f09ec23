"""EngineConfig: what it refuses, and the sizes it fills in."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from jaxserve.config import DeviceFacts, EngineConfig
from jaxserve.errors import ConfigError

CPU = DeviceFacts("cpu", 2)
GPU = DeviceFacts("gpu", 8)


@pytest.mark.parametrize(
    "name",
    [
        *("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override"),
        *("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r} must be a positive integer"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be one of auto, half, float16, bfloat16, float"),
        ({"load_format": "gguf"}, "load_format='gguf' must be one of auto, safetensors, pt, dummy"),
        ({"block_size": 7}, "block_size=7 must be 8, 16, 32, 64 or 128"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0 must be above 0, at most 1"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization=1.01"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan"),
    ],
)
def test_values_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("facts", "rows", "tokens"),
    [(CPU, 64, 256), (GPU, 256, 8192), (DeviceFacts("tpu", 4), 256, 8192)],
)
def test_sizes_are_chosen_for_the_machine(facts: DeviceFacts, rows: int, tokens: int) -> None:
    config = EngineConfig().resolve(facts, 2048)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (rows, tokens)
    assert config.max_model_len == 2048


def test_given_sizes_are_kept_and_the_rest_follows_them() -> None:
    config = EngineConfig(max_num_seqs=5, max_model_len=100, seed=3, dtype="half")
    resolved = config.resolve(CPU, 2048)
    assert (resolved.max_num_seqs, resolved.max_model_len) == (5, 100)
    assert (resolved.seed, resolved.dtype, resolved.block_size) == (3, "half", 16)
    assert EngineConfig(max_num_seqs=400).resolve(CPU, 64).max_num_batched_tokens == 800
    assert config.max_num_batched_tokens is None  # the config itself stays as it was


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 4096}, "max_model_len=4096 is more than the model's 2048"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size=4, but JAX sees only 2 cpu device"),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            "max_num_batched_tokens=32 must be at least max_num_seqs=64",
        ),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens=8 .* max_num_seqs=64"),
    ],
)
def test_contradictions_are_refused_with_the_numbers(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings).resolve(CPU, 2048)


def test_configs_can_be_made_without_jax() -> None:
    code = "import sys, jaxserve.config, jaxserve.compat; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
