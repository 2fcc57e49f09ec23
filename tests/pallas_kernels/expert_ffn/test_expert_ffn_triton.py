"""The Triton kernels against the formulas in float64 numpy, and what the engine makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_ffn import expert_ffn, triton, triton_routing
from pallas_kernels.expert_ffn.activations import LIMIT, STEEPNESS
from pallas_kernels.expert_ffn.cases import CASES, Case, cost, distinct_experts, make
from pallas_kernels.workload import MIXTRAL_8X7B, QWEN3_30B_A3B, LayerShape
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
SMALL = triton.Config(rows=16, up=32, down=32, inputs=32, splits=1, warps=4, stages=2)
GPT_OSS = LayerShape(
    heads=64,
    kv_heads=8,
    head_size=64,
    hidden=2880,
    ffn=2880,
    num_experts=32,
    top_k=4,
    activation="clamped_silu",
    biased=True,
)
LAYERS = {
    "Mixtral": MIXTRAL_8X7B,
    "Mixtral on 8 devices": replace(MIXTRAL_8X7B, num_experts=1),
    "Qwen3 30B": QWEN3_30B_A3B,
    "gpt-oss 20B": GPT_OSS,
    "Mixtral in float32": replace(MIXTRAL_8X7B, dtype="float32"),
    "more than 4 GB": replace(QWEN3_30B_A3B, num_experts=256, hidden=7168, ffn=2048),
    "60 narrow experts": replace(QWEN3_30B_A3B, num_experts=60, top_k=4, ffn=1408),
}


def gated(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if activation == "clamped_silu":
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        return (up + 1) * gate / (1 + np.exp(-STEEPNESS * gate))
    if activation == "gelu_tanh":
        return gate * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    return gate / (1 + np.exp(-gate)) * up


def oracle(arguments: dict[str, Any]) -> np.ndarray:
    x, weights, up, down = (
        np.asarray(arguments[name], np.float64) for name in ("x", "weights", "up", "down")
    )
    up_bias, down_bias = (
        np.asarray(arguments.get(name, np.zeros(shape)), np.float64)
        for name, shape in (("up_bias", up.shape[:3]), ("down_bias", down.shape[:2]))
    )
    out = np.zeros(x.shape)
    for (token, k), expert in np.ndenumerate(np.asarray(arguments["experts"])):
        if 0 <= expert < len(up):
            gate, linear = up[expert] @ x[token] + up_bias[expert]
            h = gated(arguments["activation"], gate, linear)
            out[token] += weights[token, k] * (down[expert] @ h + down_bias[expert])
    return out


def interpreted(config: triton.Config = SMALL) -> Callable[..., jax.Array]:
    return functools.partial(triton.expert_ffn, interpret=True, config=config)


def check(function: Callable[..., jax.Array], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected = oracle(arguments)
    actual = np.asarray(function(**arguments), np.float64).sum(0)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_follows_the_formulas(case: Case) -> None:
    check(interpreted(), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_follows_the_formulas(case: Case) -> None:
    check(jax.jit(triton.expert_ffn, static_argnames="activation"), case, seed=3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case: Case) -> None:
    text = lower(functools.partial(triton.expert_ffn, config=SMALL), case)
    assert ("expert_plan" in text) == (case.tokens * case.top_k * SMALL.rows > 8192)


@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 2048])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_chosen_configurations_lower_for_cuda(layer: LayerShape, tokens: int) -> None:
    case = Case("", tokens, layer.num_experts, min(layer.top_k, layer.num_experts))
    case = replace(case, hidden=layer.hidden, ffn=layer.ffn, dtype=layer.dtype)
    case = replace(case, activation=layer.activation, biased=layer.biased)
    text = lower(expert_ffn, case)
    assert "expert_up" in text and "expert_down" in text


def lower(function: Callable[..., jax.Array], case: Case, platform: str = "cuda") -> str:
    """The module's text, from shapes alone."""
    count, dtype = case.count, case.dtype
    shapes = {
        "x": ((case.tokens, case.hidden), dtype),
        "experts": ((case.tokens, case.top_k), "int32"),
        "weights": ((case.tokens, case.top_k), "float32"),
        "up": ((count, 2, case.ffn, case.hidden), dtype),
        "down": ((count, case.hidden, case.ffn), dtype),
    }
    if case.biased:
        shapes["up_bias"] = ((count, 2, case.ffn), dtype)
        shapes["down_bias"] = ((count, case.hidden), dtype)
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    return lowers_for(platform, functools.partial(function, activation=case.activation), **arrays)


def test_what_triton_cannot_do_is_left_to_the_reference() -> None:
    assert "expert_up" in lower(expert_ffn, Case("", dtype="bfloat16"))
    assert "expert_up" not in lower(expert_ffn, Case("", dtype="bfloat16", activation="gelu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layer", [MIXTRAL_8X7B, QWEN3_30B_A3B], ids=["Mixtral", "Qwen3 30B"])
def test_a_tpu_gets_a_grouped_product(layer: LayerShape, dtype: str) -> None:
    case = Case("", 64, layer.num_experts, layer.top_k, layer.hidden, layer.ffn, dtype)
    assert lower(expert_ffn, case, "tpu").count("ragged_dot") >= 2


def test_experts_nobody_chose_are_not_read() -> None:
    for tokens in (1, 300):
        arguments = make(Case("", tokens, choice="some", biased=True), seed=4)
        expected = interpreted()(**arguments)
        names = ("up", "down", "up_bias", "down_bias")
        unread = {name: arguments[name].at[3:].set(jnp.nan) for name in names}
        np.testing.assert_array_equal(interpreted()(**arguments | unread), expected)


def test_experts_elsewhere_alone_give_zero() -> None:
    for tokens, offset in ((1, -8), (5, 8), (300, 8)):
        arguments = make(Case("", tokens, biased=True), seed=5)
        elsewhere = arguments | {"experts": arguments["experts"] + offset}
        assert not np.asarray(interpreted()(**elsewhere)).any()


def test_planning_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(Case("", tokens=40, top_k=3, choice="elsewhere"), seed=6)
    direct = interpreted()(**arguments)
    monkeypatch.setattr(triton_routing, "MOST_COMPARED", 0)
    np.testing.assert_array_equal(interpreted()(**arguments), direct)


def test_splits_give_terms_of_their_own() -> None:
    case = Case("", ffn=128, biased=True)
    config = SMALL._replace(splits=2)
    assert interpreted(config)(**make(case, 7)).shape[0] == 2 * case.top_k
    check(interpreted(config), case, seed=7)
    with pytest.raises(NotImplementedError, match="can't be split"):
        interpreted(config)(**make(replace(case, ffn=96), 7))


@pytest.mark.parametrize("pairs, count", [(1, 1), (700, 5), (5000, 128), (4096, 3)])
def test_a_plan_sorts_pairs_by_expert(pairs: int, count: int) -> None:
    experts = np.random.default_rng(8).integers(-1, count + 2, pairs)
    order, starts = triton_routing.plan(jnp.asarray(experts, jnp.int32), count, interpret=True)
    groups = np.where((experts >= 0) & (experts < count), experts, count)
    np.testing.assert_array_equal(order, np.argsort(groups, kind="stable"))
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(groups), np.arange(count + 1)))


@pytest.mark.parametrize("choice", ["random", "some", "elsewhere"])
def test_the_cost_counts_the_experts_that_are_read(choice: Any) -> None:
    case = Case("", tokens=6, count=16, top_k=4, choice=choice)
    chosen = [np.asarray(make(case, seed)["experts"]) for seed in range(100)]
    here = [len(np.unique(some[(some >= 0) & (some < case.count)])) for some in chosen]
    assert np.mean(here) == pytest.approx(distinct_experts(case), rel=0.1)


def test_one_token_of_mixtral_reads_two_experts() -> None:
    case = Case("", 1, 8, 2, 4096, 14336, "bfloat16")
    assert cost(case).bytes == pytest.approx(2 * 3 * 4096 * 14336 * 2, rel=1e-3)
    assert cost(case).flops == 2 * 2 * 3 * 4096 * 14336


def test_the_candidates_hold_configurations_near_the_default() -> None:
    for case in (Case("", 1, 128, 8, 2048, 768, "bfloat16"), Case("", 512, dtype="bfloat16")):
        arguments = make(replace(case, count=min(case.count, 8)), seed=0)
        found = list(triton.candidates(**arguments))
        assert 10 < len(found) < 100 and len(set(found)) == len(found)
