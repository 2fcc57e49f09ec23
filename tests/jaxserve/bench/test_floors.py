"""The floor is arithmetic: bytes over bandwidth, FLOPs over speed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from converters import open_checkpoint
from jaxserve.bench.floors import Costs, Experts, Hardware, costs, floor_seconds
from jaxserve.bench.shapes import SHAPES, write_shape
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RouterSpec,
)

COST = Costs(
    vocab_size=100,
    weight_bytes=1000,
    token_flops=20,
    sampled_flops=4,
    kv_bytes=3,
    attention_flops=2,
)
FAST = 1e30


def shape_costs(name: str, directory: Path) -> Costs:
    write_shape(name, directory)
    return costs(open_checkpoint(directory, "dummy").config, "bfloat16")


def test_every_shape_is_a_model(tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        assert shape_costs(name, tmp_path).vocab_size == shape["vocab_size"]


def test_costs_of_the_8b_shape(tmp_path: Path) -> None:
    """8.03 billion weights, 0.525 of them in the embedding, as many in the head."""
    cost = shape_costs("llama8b", tmp_path)
    head = 128256 * 4096
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    norms = (2 * 32 + 1) * 4096
    behind = 4096 * 4096 + 3 * 4096 * 14336  # of the last layer, only sampled tokens need these
    assert cost.token_flops == 2 * (32 * layer - behind)
    assert cost.sampled_flops == 2 * (behind + head)
    assert cost.weight_bytes == 2 * (32 * layer + head + norms)
    assert cost.kv_bytes == 32 * 2 * 8 * 128 * 2
    assert cost.attention_flops == 32 * 4 * 4096


def test_a_tied_embedding_is_read_as_the_head(tmp_path: Path) -> None:
    cost = shape_costs("llama1b", tmp_path)
    head = 128256 * 2048
    layer = 2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192
    assert cost.weight_bytes == 2 * (16 * layer + head + (2 * 16 + 1) * 2048)
    assert cost.sampled_flops + cost.token_flops == 2 * (head + 16 * layer)


def test_decoding_reads_all_weights_each_step_and_the_context() -> None:
    """One prompt of 10 tokens; its 3 tokens after the first see 11, 12 and 13."""
    only_bytes = Hardware(bandwidth=1.0, flops=FAST)
    wanted = 1000 + 3 * 1000 + (11 + 12 + 13) * 3
    assert floor_seconds(COST, [(10, 4)], 1, only_bytes) == pytest.approx(wanted)


def test_prompts_take_their_products_and_attention() -> None:
    only_flops = Hardware(bandwidth=FAST, flops=1.0)
    prompt = 10 * 20 + 4 + 2 * (10 * 11 // 2)
    assert floor_seconds(COST, [(10, 1)], 1, only_flops) == pytest.approx(prompt)
    decoded = 3 * (20 + 4) + 2 * (11 + 12 + 13)
    assert floor_seconds(COST, [(10, 4)], 1, only_flops) == pytest.approx(prompt + decoded)


def test_rows_share_the_weights() -> None:
    only_bytes = Hardware(bandwidth=1.0, flops=FAST)
    lengths = [(1, 11)] * 6
    context = 6 * sum(range(2, 12)) * 3
    for rows, steps in [(1, 60), (2, 30), (6, 10), (100, 10)]:
        wanted = 1000 + steps * 1000 + context
        assert floor_seconds(COST, lengths, rows, only_bytes) == pytest.approx(wanted)


def test_each_phase_takes_the_slower_of_the_two() -> None:
    slow, fast = Hardware(1.0, 1.0), Hardware(FAST, 1.0)
    assert floor_seconds(COST, [(1000, 1)], 1, slow) == floor_seconds(COST, [(1000, 1)], 1, fast)
    assert floor_seconds(COST, [(1, 1)], 1, slow) == 1000  # the weights must be read even so


# --- experts --------------------------------------------------------------------------------------

MOE_COST = dataclasses.replace(COST, experts=(Experts(count=8, top_k=2, bytes=50),))


def test_costs_of_experts() -> None:
    """A token is multiplied with its two experts and the shared one; biases aren't multiplied."""
    norm, shared = NormSpec("rms", 1e-5), MLPSpec(24, "silu")
    moe = MoESpec(8, 12, RouterSpec(2, bias=True), "clamped_silu", bias=True, shared=shared)
    attention = AttentionSpec(4, 2, 8, 1.0, qkv_bias=True)
    layers = (LayerSpec(attention, moe, norm), LayerSpec(attention, shared, norm))
    layers += layers[:1]
    cost = costs(ModelConfig("Test", 100, 16, 64, layers, norm, False, 16), "bfloat16")
    qkv_out, one, router = 16 * 8 * (4 + 2 * 2) + 4 * 8 * 16, 3 * 12 * 16, 8 * 16
    assert cost.experts == (Experts(8, 2, 2 * 2 * (one + 2 * 12 + 16)),)
    products = 3 * (qkv_out + 3 * 24 * 16) + 2 * (2 * one + router)
    behind = 4 * 8 * 16 + 3 * 24 * 16 + 2 * one + router
    assert (cost.token_flops, cost.sampled_flops) == (
        2 * (products - behind),
        2 * (behind + 100 * 16),
    )
    others = 3 * (qkv_out + 8 * 8 + 3 * 24 * 16 + 2 * 16) + 2 * (router + 8) + 16 + 100 * 16
    assert cost.weight_bytes == 2 * others


def test_a_step_reads_the_experts_that_its_tokens_chose() -> None:
    """All subsets of two of eight are alike likely: simulated, and at the ends exact."""
    assert MOE_COST.step_bytes(0) == 1000
    assert MOE_COST.step_bytes(1) == pytest.approx(1000 + 2 * 50)
    assert MOE_COST.step_bytes(10**6) == pytest.approx(1000 + 8 * 50)
    rng = np.random.default_rng(0)
    for tokens in (2, 5):
        draws = [[rng.permutation(8)[:2] for _ in range(tokens)] for _ in range(4000)]
        distinct = np.mean([len(np.unique(draw)) for draw in draws])
        assert MOE_COST.step_bytes(tokens) == pytest.approx(1000 + 50 * distinct, rel=0.005)


def test_few_rows_read_few_experts() -> None:
    only_bytes = Hardware(bandwidth=1.0, flops=FAST)
    context, prompts = 6 * sum(range(2, 12)) * 3, MOE_COST.step_bytes(6)
    for rows, steps in [(1, 60), (2, 30), (6, 10), (100, 10)]:
        wanted = prompts + steps * MOE_COST.step_bytes(60 // steps) + context
        got = floor_seconds(MOE_COST, [(1, 11)] * 6, rows, only_bytes)
        assert got == pytest.approx(wanted)


def test_uneven_steps_read_at_least_what_the_floor_says() -> None:
    """Of 3 and of 20 tokens, two at once: three steps of two rows, 17 of one."""
    only_bytes = Hardware(bandwidth=1.0, flops=FAST)
    context = sum(range(2, 5)) + sum(range(2, 22))
    steps = 3 * MOE_COST.step_bytes(2) + 17 * MOE_COST.step_bytes(1)
    wanted = MOE_COST.step_bytes(2) + steps + context * 3
    assert floor_seconds(MOE_COST, [(1, 4), (1, 21)], 2, only_bytes) == pytest.approx(wanted)
