"""Every implementation against plain softmax attention in float64 numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.latent_attention import latent_attention, reference, triton
from pallas_kernels.latent_attention.cases import CASES, Case, make, poison, specified
from pallas_kernels.latent_attention.triton_decode import candidates
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
STATIC = ("scale", "latent_size")


def oracle(case: Case, arguments: dict) -> np.ndarray:
    """Outputs in float64, zeros where no lane owns a place."""
    q, pages = (np.asarray(arguments[name], np.float64) for name in ("q", "pages"))
    table, batch = np.asarray(arguments["page_table"]), arguments["batch"]
    out = np.zeros((*q.shape[:2], case.latent_size))
    for lane, (new, total) in enumerate(case.lanes):
        keys = pages[table[batch.row[lane]], 0].reshape(-1, case.size)[:total]
        for i in range(new):
            token, seen = int(batch.query_start[lane]) + i, keys[: total - new + i + 1]
            scores = q[token] @ seen.T * arguments["scale"]
            weights = np.exp(scores - scores.max(1, keepdims=True))
            values = weights @ seen[:, : case.latent_size]
            out[token] = values / weights.sum(1, keepdims=True)
    return out


def check(function, case: Case, seed: int) -> None:
    """With NaN in the pages where nobody may read."""
    arguments = make(case, seed)
    expected, (owned,) = oracle(case, arguments), specified(case, arguments)
    actual = np.asarray(function(**poison(case, arguments)), np.float64)
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    error = np.linalg.norm(actual[owned] - expected[owned]) / np.linalg.norm(expected[owned])
    assert error < (1e-2 if case.dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_is_softmax_attention(case):
    check(reference.latent_attention, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_is_softmax_attention(case):
    check(functools.partial(triton.latent_attention, interpret=True), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_is_softmax_attention(case):
    check(jax.jit(triton.latent_attention, static_argnames=STATIC), case, seed=3)


def lower(case: Case, **options) -> str:
    arguments = make(case, seed=0)
    options |= {name: arguments.pop(name) for name in STATIC}
    return lowers_for("cuda", functools.partial(triton.latent_attention, **options), **arguments)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case):
    text = lower(case)
    assert "latent_decode" in text
    assert ("latent_prefill" in text) == case.name.startswith("mixed")


def test_every_configuration_gives_the_same_and_lowers_for_cuda():
    case = Case("decode", ((1, 70), (1, 3)), heads=32)
    arguments = make(case, seed=4)
    want = oracle(case, arguments)[:2]
    # Warps and stages are for the compiler alone.
    distinct = {(config.tile, config.rows): config for config in candidates(**arguments)}
    assert len(distinct) == 6
    for config in distinct.values():
        assert "latent_decode" in lower(case, config=config)
        got = triton.latent_attention(**arguments, config=config, interpret=True)[:2]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_splitting_changes_nothing_but_rounding():
    case = Case("split", ((1, 1500), (1, 40)), heads=20, padding=0)
    split, whole = make(case, 5, split=True), make(case, 5, split=False)
    assert int(split["batch"].decode_count[0]) > 1
    assert int(whole["batch"].decode_count[0]) == 1
    run = functools.partial(triton.latent_attention, interpret=True)
    np.testing.assert_allclose(run(**split), run(**whole), atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    arguments = make(CASES[0], seed=0)
    for other in ({"q": jnp.zeros((6, 16, 32))}, {"latent_size": 41}):
        with pytest.raises(ValueError, match="differ"):
            latent_attention(**arguments | other)
