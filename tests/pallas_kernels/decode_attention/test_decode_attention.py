"""Every implementation against the two ops that it joins, in wider floats."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention, triton
from pallas_kernels.decode_attention.cases import CASES, Case, make, poison, specified
from pallas_kernels.lab.ops import find_op
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.paged_attention.reference import paged_attention
from pallas_kernels.rope_kv_write.reference import rope_kv_write
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
ROPE = ("qkv", "cos_sin", "norm", "k_pages", "v_pages", "page", "slot", "dtype")


def in_two_steps(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The two ops, each compared with formulas in its own tests."""
    q, k_pages, v_pages = rope_kv_write(**{name: arguments[name] for name in ROPE})
    others = {name: value for name, value in arguments.items() if name not in ROPE}
    return paged_attention(q, k_pages, v_pages, **others), k_pages, v_pages


def check(function: Callable[..., Any], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    expected = in_two_steps(arguments)
    actual = function(**poison(case, arguments))
    tolerance = find_op("decode_attention").tolerance(case)
    out, wanted = (np.asarray(y[0], np.float64) for y in (actual, expected))
    owned = specified(case, arguments)[0]
    assert np.linalg.norm((out - wanted)[owned]) < tolerance * np.linalg.norm(wanted[owned])
    # Of the pages, the new keys and values; all others are as they were.
    place = arguments["page"][owned], slice(None), arguments["slot"][owned]
    before = poison(case, arguments)
    for name, got, right in zip(("k_pages", "v_pages"), actual[1:], expected[1:], strict=True):
        new, fresh = (np.asarray(pages[place], np.float64) for pages in (got, right))
        assert np.linalg.norm(new - fresh) <= tolerance * np.linalg.norm(fresh)
        kept = np.asarray(before[name].at[place].set(0)[1:], np.float64)
        np.testing.assert_array_equal(np.asarray(got.at[place].set(0)[1:], np.float64), kept)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_interpreted_equals_the_two_ops(case: Case) -> None:
    check(functools.partial(triton.decode_attention, interpret=True), case, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_on_the_gpu_equals_the_two_ops(case: Case) -> None:
    static = ("dtype", "scale", "sliding_window")
    check(jax.jit(triton.decode_attention, static_argnames=static), case, seed=2)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton_lowers_for_cuda(case: Case) -> None:
    arguments = make(case, seed=0)
    options = ("dtype", "scale", "sliding_window")
    fixed = {name: arguments.pop(name) for name in options}
    text = lowers_for("cuda", functools.partial(triton.decode_attention, **fixed), **arguments)
    assert "decode_attention" in text


def test_requests_with_several_tokens_are_refused() -> None:
    arguments = make(CASES[0], seed=0)
    mixed = attention_cases.make(attention_cases.Case("mixed", attention_cases.MIXED), seed=0)
    with pytest.raises(ValueError, match="several tokens"):
        decode_attention(**arguments | {"batch": mixed["batch"]})
