"""Every implementation against the formulas in float64 numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_rms_norm import RMSNorm, add_rms_norm, reference, triton
from pallas_kernels.add_rms_norm.cases import CASES, Case, make
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]


def oracle(x: jax.Array, delta: jax.Array, norm: RMSNorm) -> tuple[np.ndarray, np.ndarray]:
    total = np.asarray(x, np.float64) + np.asarray(delta, np.float64).sum(0)
    normalized = total / np.sqrt(np.mean(total**2, -1, keepdims=True) + norm.eps)
    return total, normalized * np.asarray(norm.scale, np.float64)


def check(function: Callable[..., Any], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected = oracle(**arguments)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    for actual, wanted in zip(function(**arguments), expected, strict=True):
        assert actual.dtype == arguments["x"].dtype
        error = np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < tolerance


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_follows_the_formulas(case: Case) -> None:
    check(reference.add_rms_norm, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_follows_the_formulas(case: Case) -> None:
    check(functools.partial(triton.add_rms_norm, interpret=True), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_follows_the_formulas(case: Case) -> None:
    check(jax.jit(triton.add_rms_norm), case, seed=3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case: Case) -> None:
    assert "add_rms_norm" in lowers_for("cuda", triton.add_rms_norm, **make(case, seed=0))


def test_rows_that_do_not_fit_into_registers_are_left_to_xla() -> None:
    with pytest.raises(NotImplementedError, match="too long"):
        triton.add_rms_norm(**make(Case("long", rows=1, width=20_000), seed=0), interpret=True)


def test_arguments_that_do_not_fit_are_refused() -> None:
    norm = RMSNorm(jnp.ones(8), 1e-5)
    with pytest.raises(ValueError, match="fit together"):
        add_rms_norm(jnp.zeros((2, 8)), jnp.zeros((2, 8)), norm)
