"""Every implementation against the formulas in float64 numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_linear import fused_linear, reference, triton
from pallas_kernels.fused_linear.cases import CASES, Case, make, of_layer
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, LayerShape
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
STATIC = ("silu_gated", "partial")
SMALL = triton.Config(outputs=16, inputs=128, splits=1, warps=4, stages=2)


def oracle(arguments: dict[str, Any]) -> np.ndarray:
    x, w = (np.asarray(arguments[name], np.float64) for name in ("x", "w"))
    if arguments["silu_gated"]:
        gate, up = x @ w[0].T, x @ w[1].T
        return gate / (1 + np.exp(-gate)) * up
    return x @ w.T


def check(function: Callable[..., jax.Array], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected = oracle(arguments)
    actual = np.asarray(function(**arguments), np.float64)
    if arguments["partial"]:
        actual = actual.sum(0)
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 1e-2


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_follows_the_formulas(case: Case) -> None:
    check(reference.fused_linear, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_follows_the_formulas(case: Case) -> None:
    check(functools.partial(triton.fused_linear, interpret=True, config=SMALL), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_follows_the_formulas(case: Case) -> None:
    function = functools.partial(triton.fused_linear, config=SMALL)
    check(jax.jit(function, static_argnames=STATIC), case, seed=3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case: Case) -> None:
    arguments = make(case, seed=0)
    static = {name: arguments.pop(name) for name in STATIC}
    function = functools.partial(triton.fused_linear, config=SMALL, **static)
    assert "fused_linear" in lowers_for("cuda", function, **arguments)


@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("model", [LLAMA_1B, LLAMA_8B], ids=["1B", "8B"])
def test_the_chosen_configs_lower_for_cuda(model: LayerShape, rows: int) -> None:
    """On an H200, for which there are tuned ones; the next test has none."""
    for case in of_layer(model, rows).values():
        function = functools.partial(
            triton.fused_linear, silu_gated=case.gated, partial=case.partial
        )
        assert "fused_linear" in lowers_for("cuda", function, *shapes(case))


@pytest.mark.parametrize(
    "hidden, ffn, qkv", [(896, 4864, 1152), (3584, 18944, 4608), (5120, 13824, 7680)]
)
def test_the_default_configs_lower_for_cuda(hidden: int, ffn: int, qkv: int) -> None:
    for outputs, inputs, gated in ((qkv, hidden, False), (ffn, hidden, True), (hidden, ffn, False)):
        case = Case("", 8, outputs, inputs, gated=gated, partial=not gated)
        function = functools.partial(triton.fused_linear, silu_gated=gated, partial=not gated)
        assert "fused_linear" in lowers_for("cuda", function, *shapes(case))


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """x and w of a case, without their numbers."""
    w = (*((2,) if case.gated else ()), case.outputs, case.inputs)
    return tuple(jax.ShapeDtypeStruct(shape, case.dtype) for shape in ((case.rows, case.inputs), w))


def test_odd_weights_and_many_rows_are_left_to_xla() -> None:
    for case in (Case("odd", outputs=100), Case("many rows", rows=65)):
        with pytest.raises(NotImplementedError):
            triton.fused_linear(**make(case, seed=0), interpret=True)


def test_splits_need_partial_sums() -> None:
    config = triton.Config(outputs=16, inputs=128, splits=2, warps=4, stages=2)
    with pytest.raises(NotImplementedError, match="partial"):
        triton.fused_linear(**make(Case("plain"), seed=0), config=config, interpret=True)
    check(
        functools.partial(triton.fused_linear, config=config, interpret=True),
        Case("two terms", partial=True),
        seed=4,
    )


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="fit together"):
        fused_linear(x, jnp.zeros((4, 9)))
    with pytest.raises(ValueError, match="gated"):
        fused_linear(x, jnp.zeros((2, 4, 8)), silu_gated=True, partial=True)
