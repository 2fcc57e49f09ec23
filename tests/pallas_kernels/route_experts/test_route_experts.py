"""Every implementation against float64 numpy, which sorts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lab import gates
from pallas_kernels.lab.ops import Candidate, find_op
from pallas_kernels.route_experts import reference, route_experts, triton
from pallas_kernels.route_experts.cases import CASES, MODELS, Case, gate_cases, make, specified
from pallas_kernels.workload import LLAMA_8B, QWEN3_30B_A3B
from tests.helpers.lowering import lowers_for
from tests.helpers.routing import route, softmax

STATIC = ("top_k", "scores", "normalize", "scale", "groups", "top_groups", "group_score")
KERNEL = '"route_experts"'
FOR_TRITON = [case for case in CASES if case.groups == 1]
CONFIGS = {
    "no splits": triton.Config(experts=16, inputs=64, splits=1, warps=4, stages=2),
    "splits": triton.Config(experts=16, inputs=16, splits=4, warps=4, stages=2),
    "a split that is short, one that has nothing": triton.Config(16, 32, 7, 4, 2),
    "wide": triton.Config(experts=32, inputs=128, splits=2, warps=4, stages=2),
}

Function = Callable[..., tuple[jax.Array, jax.Array]]


def jitted(function: Function) -> Function:
    return jax.jit(function, static_argnames=STATIC)


def interpreted(config: triton.Config | None = None) -> Function:
    return jitted(functools.partial(triton.route_experts, config=config, interpret=True))


def named(case: Case) -> str:
    return case.name


def check(function: Function, case: Case, seed: int) -> None:
    arguments = make(case, seed)
    experts, weights = function(**arguments)
    assert (experts.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    assert experts.shape == weights.shape == (case.tokens, case.top_k)
    x, w = (np.asarray(arguments[name], np.float64) for name in ("x", "w"))
    bias = np.asarray(arguments["bias"], np.float64) if case.biased else 0
    right_experts, right_weights = route(case, x @ w.T + bias, arguments["correction"])
    right_experts[case.tokens - case.padding :] = -1
    promised, weighed = specified(case, arguments)
    np.testing.assert_array_equal(np.asarray(experts)[promised], right_experts[promised])
    np.testing.assert_allclose(np.asarray(weights)[weighed], right_weights[weighed], rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_reference_chooses_what_the_definition_chooses(case: Case) -> None:
    check(jitted(reference.route_experts), case, seed=1)


@pytest.mark.parametrize("case", FOR_TRITON, ids=named)
def test_triton_interpreted_chooses_what_the_definition_chooses(case: Case) -> None:
    check(interpreted(), case, seed=2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("hidden", [64, 200])
def test_triton_interpreted_with_other_configurations(config: triton.Config, hidden: int) -> None:
    check(interpreted(config), Case("", 18, 40, 3, hidden, corrected=True), seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FOR_TRITON, ids=named)
def test_triton_on_the_gpu_chooses_what_the_definition_chooses(case: Case) -> None:
    check(jitted(triton.route_experts), case, seed=4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64])
def test_on_the_gpu_a_thousand_calls_of_one_program_agree(tokens: int) -> None:
    """Each finds the arrivals at zero, and every part of the logits stored."""
    arguments = make(replace(MODELS["Qwen3 30B"], tokens=tokens), seed=5)
    x = arguments.pop("x")
    one = functools.partial(triton.route_experts, **arguments)

    @jax.jit
    def calls(xs: jax.Array) -> Any:
        return jax.lax.map(lambda i: one(xs[i % 2]), jnp.arange(1000))

    for result in calls(jnp.stack([x, -x])):  # or XLA would call it once
        for parity in (0, 1):
            same = np.asarray(result[parity::2])
            np.testing.assert_array_equal(same, np.broadcast_to(same[0], same.shape))


# --- what becomes of it for a GPU -----------------------------------------------------------------


def lower(function: Callable[..., Any], case: Case) -> str:
    """The module's text for a GPU."""
    shapes = {
        "x": ((case.tokens, case.hidden), case.dtype),
        "w": ((case.count, case.hidden), case.dtype),
        "is_token": ((case.tokens,), "bool"),
    }
    if case.biased:
        shapes["bias"] = ((case.count,), case.dtype)
    if case.corrected:
        shapes["correction"] = ((case.count,), "float32")
    static = {name: getattr(case, name) for name in STATIC}
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    return lowers_for("cuda", functools.partial(function, **static), **arrays)


@pytest.mark.parametrize("case", FOR_TRITON, ids=named)
def test_triton_lowers_for_cuda(case: Case) -> None:
    for config in CONFIGS.values():
        assert KERNEL in lower(functools.partial(triton.route_experts, config=config), case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_the_chosen_configurations_lower_for_cuda(model: str, dtype: str) -> None:
    for tokens in (1, 8, 16, 32, 64):
        assert KERNEL in lower(route_experts, replace(MODELS[model], tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("model", MODELS)
def test_the_candidates_lower_for_cuda(model: str) -> None:
    case = replace(MODELS[model], tokens=8)
    shapes = ((case.tokens, case.hidden), (case.count, case.hidden))
    found = list(triton.candidates(*(jax.ShapeDtypeStruct(s, case.dtype) for s in shapes)))
    assert 10 < len(found) == len(set(found))
    for config in found[::7]:
        assert KERNEL in lower(functools.partial(triton.route_experts, config=config), case)


def test_groups_and_many_rows_are_left_to_the_reference() -> None:
    assert KERNEL not in lower(route_experts, Case("", groups=2))
    assert KERNEL not in lower(route_experts, Case("", tokens=65))
    for case, reason in ((Case("", groups=2), "groups"), (Case("", tokens=65), "65 rows")):
        with pytest.raises(NotImplementedError, match=reason):
            interpreted()(**make(case, seed=0))
    with pytest.raises(NotImplementedError, match="GPU"):
        triton.route_experts(**make(Case(""), seed=0))


# --- ties, NaN, the gates -------------------------------------------------------------------------


@pytest.mark.parametrize("function", [interpreted(), jitted(reference.route_experts)])
def test_of_equal_experts_the_first_are_chosen(function: Function) -> None:
    arguments = make(Case("", count=40, top_k=7), seed=6)
    equal = arguments | {"w": jnp.zeros((40, 64)).at[11].set(arguments["x"][2])}
    experts, weights = function(**equal)
    assert experts[2].tolist() == [11, 0, 1, 2, 3, 4, 5]
    assert np.ptp(np.asarray(weights[2, 1:])) == 0


@pytest.mark.parametrize("function", [interpreted(), jitted(reference.route_experts)])
def test_normalized_softmax_is_the_softmax_over_the_chosen(function: Function) -> None:
    logits = np.random.default_rng(7).normal(0, 20, (30, 9)).astype(np.float32)
    settings = make(Case("", 30, 9, 4, normalize=True), seed=7)
    experts, weights = function(**settings | {"x": jnp.asarray(logits), "w": jnp.eye(9)})
    own = np.take_along_axis(logits.astype(np.float64), np.asarray(experts), 1)
    np.testing.assert_allclose(weights, softmax(own), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_without_numbers_harms_no_other(scores: str, bad: float) -> None:
    case = Case("", 20, 12, 3, scores=scores, normalize=True)
    arguments = make(case, seed=8)
    spoiled = arguments | {"x": arguments["x"].at[5].set(bad)}
    good = np.arange(case.tokens) != 5
    for got, want in zip(interpreted()(**spoiled), interpreted()(**arguments), strict=True):
        np.testing.assert_array_equal(np.asarray(got)[good], np.asarray(want)[good])
    experts = np.asarray(interpreted()(**spoiled)[0][5])
    assert (experts >= 0).all() and (experts < 16).all()


@pytest.mark.parametrize("name", ["padding", "ties", "sigmoid, correction", "gpt-oss 20B"])
def test_it_passes_the_gates(name: str) -> None:
    op = find_op("route_experts")
    (case,) = op.find_cases(False, name)
    verdict = gates.check(op, Candidate("triton", triton.route_experts), case, 9, interpret=True)
    assert verdict.status == "passed", verdict


def last_of_equals(x: Any, w: Any, **options: Any) -> Any:
    """Right but for the order of experts that tie."""
    experts, weights = reference.route_experts(x, w[::-1], **options)
    return w.shape[0] - 1 - experts, weights


def in_another_order(x: Any, w: Any, **options: Any) -> Any:
    return tuple(y[:, ::-1] for y in reference.route_experts(x, w, **options))


@pytest.mark.parametrize(
    ("function", "case"), [(last_of_equals, "ties"), (in_another_order, "plain")]
)
def test_the_gates_find_wrong_choices(function: Any, case: str) -> None:
    op = find_op("route_experts")
    (found,) = op.find_cases(False, case)

    def by_name(**arguments: Any) -> Any:
        return function(arguments.pop("x"), arguments.pop("w"), **arguments)

    verdict = gates.check(op, Candidate("mine", by_name), found, 10, interpret=True)
    assert (verdict.status, verdict.gate) == ("failed", "values")


@pytest.mark.parametrize("model", MODELS)
def test_rounding_decides_few_choices(model: str) -> None:
    case = replace(MODELS[model], tokens=64)
    assert specified(case, make(case, seed=11))[1].mean() > 0.8


def test_only_mixtures_of_experts_have_gates() -> None:
    assert gate_cases(LLAMA_8B) == ()
    assert {case.scores for case in gate_cases(QWEN3_30B_A3B)} == {"softmax", "sigmoid"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((5, 63))}, "don't fit together"),
        ({"bias": jnp.zeros(7)}, "bias .* doesn't fit"),
        ({"correction": jnp.zeros((8, 1))}, "correction .* doesn't fit"),
        ({"is_token": jnp.zeros(8, bool)}, "is_token .* doesn't fit"),
        ({"top_k": 9}, "9 of 8 experts"),
        ({"top_k": 3, "groups": 4}, "3 of 8 experts in 1 of 4 groups"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_experts(**make(Case(""), seed=0) | changes)
