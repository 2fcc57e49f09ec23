"""How many pages there are, in numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.config import DeviceFacts, EngineConfig, ResolvedConfig
from jaxserve.engine import memory
from jaxserve.engine.memory import GIB, MemoryPlan, activation_bytes, check_fits, plan_memory
from jaxserve.errors import ConfigError
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, NormSpec

NORM = NormSpec("rms", 1e-5)
LAYER = LayerSpec(AttentionSpec(8, 4, 16, 0.25), MLPSpec(256, "silu"), NORM)
MODEL = ModelConfig("Test", 1000, 128, 512, (LAYER,) * 3, NORM, False, 128)
PAGE_BYTES = 3 * 2 * 4 * 16 * 16 * 2  # layers, K and V, heads, head size, slots, bfloat16


def resolved(**settings: Any) -> ResolvedConfig:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    return EngineConfig(**sizes | settings).resolve(DeviceFacts("cpu", 8), 512)


def pages(**settings: Any) -> MemoryPlan:
    return plan_memory(resolved(**settings), MODEL, jnp.dtype("bfloat16"))


class FakeDevice:
    """A device that tells its memory."""

    def __init__(self, limit: int, in_use: int) -> None:
        self._stats = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self) -> dict[str, int]:
        return self._stats


def test_a_number_of_pages_comes_with_the_paddings_page_on_top() -> None:
    plan = pages(num_gpu_blocks_override=40)
    assert (plan.num_pages, plan.page_bytes) == (41, PAGE_BYTES)


def test_bytes_for_the_cache_hold_the_paddings_page_too() -> None:
    plan = pages(kv_cache_memory_bytes=100 * PAGE_BYTES + 5)
    assert plan.num_pages == 100
    assert pages(kv_cache_memory_bytes=1).num_pages == 1


def test_devices_share_a_page() -> None:
    plan = pages(tensor_parallel_size=4, kv_cache_memory_bytes=100 * PAGE_BYTES)
    assert (plan.page_bytes, plan.num_pages) == (PAGE_BYTES // 4, 400)


def test_a_cpu_takes_no_more_than_all_rows_could_use() -> None:
    assert pages().num_pages == 4 * 512 // 16


def test_a_gpu_takes_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, in_use = 8 * GIB, 3 * GIB
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [FakeDevice(limit, in_use)])
    plan = pages()
    assert (plan.limit, plan.in_use) == (limit, in_use)
    cache = plan.num_pages * plan.page_bytes
    assert limit - PAGE_BYTES < in_use + plan.activations + cache <= limit
    assert "weights 3.00 GiB, activations 0.25 GiB" in str(plan)
    assert "of 8.00 GiB" in str(plan)


def test_a_gpu_that_is_full_has_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [FakeDevice(GIB, GIB)])
    assert pages().num_pages == 1


def test_larger_steps_and_models_need_more_scratch_memory() -> None:
    base = activation_bytes(resolved(), MODEL, jnp.dtype("bfloat16"))
    assert base >= GIB // 4 + 7 * 4 * 1000 * 4 + 64 * 3 * 256 * 2
    more_tokens = activation_bytes(resolved(max_num_batched_tokens=128), MODEL, jnp.bfloat16)
    more_rows = activation_bytes(resolved(max_num_seqs=8), MODEL, jnp.bfloat16)
    wide = dataclasses.replace(MODEL, vocab_size=2000)
    assert min(more_tokens, more_rows) > base
    assert activation_bytes(resolved(), wide, jnp.bfloat16) > base
    assert activation_bytes(resolved(), MODEL, jnp.float32) > base
    assert activation_bytes(resolved(tensor_parallel_size=4), MODEL, jnp.bfloat16) < base


def test_one_longest_sequence_must_fit() -> None:
    plan = MemoryPlan(num_pages=33, page_bytes=GIB // 64, in_use=GIB, activations=0, limit=4 * GIB)
    check_fits(plan, resolved(max_model_len=512))
    plan = dataclasses.replace(plan, num_pages=32)
    with pytest.raises(ConfigError) as error:
        check_fits(plan, resolved(max_model_len=512))
    text = str(error.value)
    assert "max_model_len=512 tokens needs 0.50 GiB" in text
    assert "room for 496 tokens" in text
    assert "Set max_model_len=496 or less" in text
    assert "(32 pages)" in text


def test_without_room_for_a_page_no_length_is_recommended() -> None:
    plan = MemoryPlan(num_pages=1, page_bytes=GIB, in_use=GIB, activations=0, limit=GIB)
    with pytest.raises(ConfigError) as error:
        check_fits(plan, resolved())
    assert "room for 0 tokens" in str(error.value)
    assert "max_model_len=0" not in str(error.value)
