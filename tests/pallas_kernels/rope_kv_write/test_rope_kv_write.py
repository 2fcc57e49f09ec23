"""Every implementation against the formulas in float64 numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.rope_kv_write import reference, triton
from pallas_kernels.rope_kv_write.cases import CASES, Case, make
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]


def oracle(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray, ...]:
    qkv, k_pages, v_pages = (
        np.array(arguments[name], np.float64) for name in ("qkv", "k_pages", "v_pages")
    )
    qkv = qkv.sum(0)
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1]
    norm = arguments["norm"]
    if norm is not None:
        q, k = (
            x / np.sqrt(np.mean(x**2, -1, keepdims=True) + norm.eps) * np.asarray(scale, np.float64)
            for x, scale in ((q, norm.q_scale), (k, norm.k_scale))
        )
    if arguments["cos_sin"] is not None:
        cos, sin = (np.asarray(part, np.float64)[:, None, None] for part in arguments["cos_sin"])

        def rotate(x: np.ndarray) -> np.ndarray:
            a, b, rest = np.split(x, (cos.shape[-1], 2 * cos.shape[-1]), -1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

        q, k = rotate(q), rotate(k)
    for token in range(case.tokens - case.padding):
        place = int(arguments["page"][token]), slice(None), int(arguments["slot"][token])
        k_pages[place], v_pages[place] = k[token, :, 0], v[token]
    return q.reshape(case.tokens, -1, case.head_size), k_pages, v_pages


def check(function: Callable[..., Any], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected = oracle(case, arguments)
    for actual, wanted in zip(function(**arguments), expected, strict=True):
        actual = np.asarray(actual, np.float64)
        assert np.isfinite(actual).all()
        if actual.ndim == 4:  # pages; what padding tokens leave in page 0 is nobody's business
            actual, wanted = actual[1:], wanted[1:]
        error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
        assert error < (1e-2 if case.dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_follows_the_formulas(case: Case) -> None:
    check(reference.rope_kv_write, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_follows_the_formulas(case: Case) -> None:
    check(functools.partial(triton.rope_kv_write, interpret=True), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_follows_the_formulas(case: Case) -> None:
    check(jax.jit(triton.rope_kv_write, static_argnames="dtype"), case, seed=3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case: Case) -> None:
    arguments = make(case, seed=0)
    function = functools.partial(triton.rope_kv_write, dtype=arguments.pop("dtype"))
    assert "rope_kv_write" in lowers_for("cuda", function, **arguments)
