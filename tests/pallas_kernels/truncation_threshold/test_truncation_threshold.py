"""Every implementation against float64 numpy, which sorts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.truncation_threshold import reference, triton, truncation_threshold
from pallas_kernels.truncation_threshold.cases import CASES, KINDS, Case, make
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
INTERPRETED = jax.jit(
    functools.partial(triton.truncation_threshold, interpret=True), static_argnames="config"
)
REFERENCE = jax.jit(reference.truncation_threshold)
SMALL = triton.Config(group=32, warps=1, unroll=1, pivots=3)
EPS = float(np.finfo(np.float32).eps)


def shapes(lanes: int, vocab: int) -> list[jax.ShapeDtypeStruct]:
    """The op's arguments, as shapes."""
    dtypes = jnp.float32, jnp.int32, jnp.float32
    settings = [jax.ShapeDtypeStruct((lanes,), dtype) for dtype in dtypes]
    return [jax.ShapeDtypeStruct((lanes, vocab), jnp.float32), *settings]


def oracle(row: np.ndarray, min_p: float, top_k: int, top_p: float, sign: int) -> np.ndarray:
    """Which tokens of a lane min-p, top-k and top-p keep, one after the other.

    Float32 rounds min-p's floor and top-p's sums. With ``sign`` -1 and 1, what lies closer to a
    limit than that is dropped and kept; in between, nothing else may differ: each truncation that
    keeps more leaves more to those after it.
    """
    x = row.astype(np.float64)
    keep = np.isfinite(x)
    if min_p > 0:
        offset = np.log(np.float64(np.float32(min_p)))
        rounding = 2 * EPS * max(abs(x.max()), abs(offset))
        keep &= (x >= x.max() + offset - sign * rounding) | (x == x.max())
    if 0 < top_k < len(x) and keep.sum() > top_k:
        keep &= x >= np.sort(x[keep])[-top_k]
    if top_p < 1:
        weights = np.where(keep, np.exp(x - x.max()), 0)
        order = np.argsort(-x, kind="stable")
        sums = np.concatenate([[0], np.cumsum(weights[order])])
        likelier = sums[np.searchsorted(-x[order], -x)] / sums[-1]  # mass before a token's ties
        rounding = EPS * np.sqrt(len(x))
        keep &= (likelier < np.float32(top_p) + sign * rounding) | (x == x.max())
    return keep


def check(function: Callable[..., jax.Array], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    logits = np.asarray(arguments["logits"])
    threshold = np.asarray(function(**arguments))
    assert threshold.shape == (case.lanes,)
    assert threshold.dtype == np.float32
    settings = [np.asarray(arguments[name]) for name in ("min_p", "top_k", "top_p")]
    for lane, (row, *setting) in enumerate(zip(logits, *settings)):
        keep = np.isfinite(row) & (row >= threshold[lane])
        must, may = (oracle(row, *setting, sign=sign) for sign in (-1, 1))
        assert keep[must].all(), (lane, setting, keep.sum(), must.sum(), may.sum())
        assert not keep[~may].any(), (lane, setting, keep.sum(), must.sum(), may.sum())


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_keeps_what_the_definition_keeps(case: Case) -> None:
    check(REFERENCE, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_keeps_what_the_definition_keeps(case: Case) -> None:
    check(INTERPRETED, case, seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_triton_interpreted_with_other_tiles(kind: str) -> None:
    case = Case(kind, kind=kind, min_p=(0, 0.1), top_k=(0, 5, 600), top_p=(0.9, 0.4))
    check(functools.partial(INTERPRETED, config=SMALL), case, seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_keeps_what_the_definition_keeps(case: Case) -> None:
    check(jax.jit(triton.truncation_threshold), case, seed=4)


@pytest.mark.parametrize("lanes", [1, 256])
@pytest.mark.parametrize("vocab", [999, 32_000, 50_257, 128_256, 151_936, 262_144])
def test_triton_lowers_for_cuda(lanes: int, vocab: int) -> None:
    arguments = shapes(lanes, vocab)
    text = lowers_for("cuda", triton.truncation_threshold, *arguments)
    assert "truncation_threshold" in text


@pytest.mark.parametrize("config", list(triton.candidates(*shapes(8, 32_000))))
def test_every_candidate_lowers_for_cuda(config: triton.Config) -> None:
    function = functools.partial(triton.truncation_threshold, config=config)
    assert "truncation_threshold" in lowers_for("cuda", function, *shapes(8, 32_000))


def test_lanes_do_not_depend_on_each_other() -> None:
    arguments = make(Case("mixed", min_p=(0, 0.1), top_k=(0, 5, 600), top_p=(1, 0.4)), 5)
    together = INTERPRETED(**arguments)
    for lane in range(0, 8, 3):
        alone = INTERPRETED(**{name: x[lane : lane + 1] for name, x in arguments.items()})
        assert alone[0] == together[lane]


def test_a_lane_that_asks_for_nothing_gets_minus_infinity() -> None:
    arguments = make(Case("first two ask for nothing", top_k=(0, -1, 3, 4)), seed=6)
    for function in (INTERPRETED, REFERENCE):
        keeps_all = np.isneginf(np.asarray(function(**arguments)))
        assert keeps_all.tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize("function", [INTERPRETED, REFERENCE])
def test_both_zeros_tie_and_ruled_out_tokens_count_for_nothing(function: Any) -> None:
    arguments = make(Case("zeros", top_k=(1, 3), top_p=(1.0, 0.99)), seed=7)
    logits = jnp.full((8, 999), -jnp.inf).at[:, 100:103].set(jnp.array([0.0, -0.0, -1.0]))
    keep = logits >= function(**(arguments | {"logits": logits}))[:, None]
    assert keep.sum(-1).tolist() == [2, 3] * 4


@pytest.mark.parametrize("function", [INTERPRETED, REFERENCE])
@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan])
def test_a_lane_with_nothing_to_choose_does_no_harm(function: Any, bad: float) -> None:
    arguments = make(Case("bad lane", top_k=(4,), top_p=(0.99,)), seed=8)
    spoilt = arguments | {"logits": arguments["logits"].at[3].set(bad)}
    good = np.arange(8) != 3
    np.testing.assert_array_equal(function(**spoilt)[good], function(**arguments)[good])


def test_arguments_that_do_not_fit_are_refused() -> None:
    good = make(Case("any"), seed=0)
    for name, bad in (
        ("logits", good["logits"].astype(jnp.bfloat16)),
        ("logits", good["logits"][:2]),
        ("top_k", good["top_p"]),
        ("top_p", good["top_p"][:, None]),
    ):
        with pytest.raises(ValueError, match="must be"):
            truncation_threshold(**(good | {name: bad}))
