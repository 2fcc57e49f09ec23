"""Every implementation against plain softmax attention in float64 numpy."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import paged_attention, reference, triton
from pallas_kernels.paged_attention.cases import CASES, VARIANT_CASES, Case, make
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]


def oracle(case: Case, arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    """Outputs in float64 and which tokens a lane owns."""
    q, k, v = (np.asarray(arguments[n], np.float64) for n in ("q", "k_pages", "v_pages"))
    table, batch = np.asarray(arguments["page_table"]), arguments["batch"]
    variant = arguments.get("variant")
    out, owned = np.zeros(q.shape), np.zeros(q.shape[0], bool)
    for lane, (new, total) in enumerate(case.lanes):
        pages = table[batch.row[lane]]
        keys, values = (
            p[pages].transpose(0, 2, 1, 3).reshape(-1, case.kv_heads, case.head_size)[:total]
            for p in (k, v)
        )
        for i in range(new):
            token, position = int(batch.query_start[lane]) + i, total - new + i
            low = 0 if case.sliding_window is None else position - case.sliding_window + 1
            visible = slice(max(low, 0), position + 1)
            for head in range(case.heads):
                kv_head = head // (case.heads // case.kv_heads)
                scores = keys[visible, kv_head] @ q[token, head] * arguments["scale"]
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                if case.alibi:
                    behind = np.arange(visible.start, visible.stop) - position
                    scores = scores + float(variant.alibi_slopes[head]) * behind
                sink = float(variant.sinks[head]) if case.sinks else -np.inf
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                divisor = weights.sum() + np.exp(sink - top)
                out[token, head] = weights @ values[visible, kv_head] / divisor
            owned[token] = True
    return out, owned


def check(function, case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected, owned = oracle(case, arguments)
    actual = np.asarray(function(**arguments), np.float64)
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual[owned] - expected[owned]) / np.linalg.norm(expected[owned])
    assert error < (1e-2 if case.dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_is_softmax_attention(case):
    check(reference.paged_attention, case, seed=1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_is_softmax_attention(case):
    check(functools.partial(triton.paged_attention, interpret=True), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_is_softmax_attention(case):
    check(jax.jit(triton.paged_attention, static_argnames=("scale", "sliding_window")), case, 3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case):
    arguments = make(case, seed=0)
    statics = {name: arguments.pop(name) for name in ("scale", "sliding_window")}
    text = lowers_for("cuda", functools.partial(triton.paged_attention, **statics), **arguments)
    assert "paged_decode" in text
    assert ("paged_prefill" in text) == case.name.startswith("mixed")


def test_splitting_changes_nothing_but_rounding():
    case = Case("split", ((1, 1500), (1, 40)), padding=0)
    split, whole = make(case, 5, split=True), make(case, 5, split=False)
    assert int(split["batch"].decode_count[0]) > 1
    assert int(whole["batch"].decode_count[0]) == 1
    run = functools.partial(triton.paged_attention, interpret=True)
    np.testing.assert_allclose(run(**split)[:2], run(**whole)[:2], atol=1e-5)


def test_a_sink_counts_once_however_a_lane_is_split():
    case = Case("split", ((1, 1500),), padding=0, sinks=True)
    split, whole = make(case, 5, split=True), make(case, 5, split=False)
    assert int(split["batch"].decode_count[0]) > 1
    run = functools.partial(triton.paged_attention, interpret=True)
    np.testing.assert_allclose(run(**split), run(**whole), atol=1e-5)


@pytest.mark.parametrize("case", VARIANT_CASES, ids=[case.name for case in VARIANT_CASES])
def test_variants_reach_triton_where_plain_attention_goes_to_mosaic(case):
    lanes = ((1, 40), (200, 230))
    arguments = make(replace(case, lanes=lanes, dtype="bfloat16", page_size=16), seed=0)
    statics = {name: arguments.pop(name) for name in ("scale", "sliding_window")}
    chosen = functools.partial(paged_attention, **statics)
    text = lowers_for("cuda", chosen, **arguments)
    assert "paged_prefill" in text and "triton" in text and "mosaic_gpu" not in text
    arguments.pop("variant")
    assert "mosaic_gpu" in lowers_for("cuda", chosen, **arguments)


def test_shapes_that_do_not_fit_are_refused():
    arguments = make(CASES[0], seed=0)
    with pytest.raises(ValueError, match="multiple"):
        paged_attention(**arguments | {"q": jnp.zeros((6, 3, 64))})
    with pytest.raises(ValueError, match="fit together"):
        paged_attention(**arguments | {"q": jnp.zeros((6, 4, 32))})
