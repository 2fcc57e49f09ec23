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
from pallas_kernels.fused_linear.cases import CASES, Case, make
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
SMALL = triton.Tiling(outputs=16, inputs=128, warps=4, stages=2)


def oracle(arguments: dict[str, Any]) -> np.ndarray:
    x, w = (np.asarray(arguments[name], np.float64) for name in ("x", "w"))
    norm, residual = arguments["norm"], arguments["residual"]
    if norm is not None:
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + norm.eps)
        x = x * np.asarray(norm.scale, np.float64)
    if arguments["silu_gated"]:
        gate, up = x @ w[0].T, x @ w[1].T
        return gate / (1 + np.exp(-gate)) * up
    return x @ w.T + (0 if residual is None else np.asarray(residual, np.float64))


def check(function: Callable[..., jax.Array], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected = oracle(arguments)
    actual = np.asarray(function(**arguments), np.float64)
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 1e-2


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_follows_the_formulas(case: Case) -> None:
    check(reference.fused_linear, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_follows_the_formulas(case: Case) -> None:
    check(functools.partial(triton.fused_linear, interpret=True, tiling=SMALL), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_follows_the_formulas(case: Case) -> None:
    function = functools.partial(triton.fused_linear, tiling=SMALL)
    check(jax.jit(function, static_argnames="silu_gated"), case, seed=3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case: Case) -> None:
    arguments = make(case, seed=0)
    gated = arguments.pop("silu_gated")
    function = functools.partial(triton.fused_linear, tiling=SMALL, silu_gated=gated)
    assert "fused_linear" in lowers_for("cuda", function, **arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_the_chosen_tiling_lowers_for_cuda(gated: bool) -> None:
    arguments = make(Case("wide", outputs=6144, normalizes=True, gated=gated), seed=0)
    gated = arguments.pop("silu_gated")
    function = functools.partial(triton.fused_linear, silu_gated=gated)
    assert "fused_linear" in lowers_for("cuda", function, **arguments)


def test_narrow_weights_and_many_rows_are_left_to_xla() -> None:
    for case in (Case("narrow", outputs=128), Case("many rows", rows=17, outputs=6144)):
        with pytest.raises(NotImplementedError):
            triton.fused_linear(**make(case, seed=0), interpret=True)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="fit together"):
        fused_linear(x, jnp.zeros((4, 9)))
    with pytest.raises(ValueError, match="residual"):
        fused_linear(x, jnp.zeros((2, 4, 8)), silu_gated=True, residual=jnp.zeros((2, 4)))
