"""The gates let right kernels through and find each kind of wrong one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Kernels
from pallas_kernels.lab import gates
from pallas_kernels.lab.ops import OPS, Candidate, find_candidate, find_op
from pallas_kernels.rope_kv_write import reference as rope
from pallas_kernels.workload import LLAMA_8B
from tests.helpers import toy_kernels, toy_linear

SEED = 11


def verdict(op_name: str, function: Any, case_name: str) -> gates.Verdict:
    op = find_op(op_name)
    (case,) = op.find_cases(False, case_name)
    return gates.check(op, Candidate("mine", function), case, SEED, interpret=True)


@pytest.mark.parametrize(
    ("op_name", "case_name"),
    [
        ("fused_linear", "partial sums"),
        ("fused_linear", "gate"),
        ("paged_attention", "mixed, bfloat16"),
        ("paged_attention", "decode, window"),
        ("rope_kv_write", "head norms, bfloat16"),
    ],
)
def test_references_pass_against_themselves_in_float64(op_name: str, case_name: str) -> None:
    found = verdict(op_name, find_op(op_name).reference, case_name)
    assert found.status == "passed"
    assert found.error is not None and found.error < 6e-3


def test_a_triton_kernel_is_interpreted_where_there_is_no_gpu() -> None:
    op = find_op("rope_kv_write")
    (case,) = op.find_cases(False, "plain")
    triton = find_candidate(op, "triton")
    assert gates.check(op, triton, case, SEED, interpret=True).status == "passed"
    refused = gates.check(op, triton, case, SEED, interpret=False)
    assert refused.status == "unsupported" and "GPU" in refused.message


def test_every_implementation_takes_the_arguments_of_its_op() -> None:
    for op in map(find_op, OPS):
        for name in op.implementations:
            assert find_candidate(op, name).lacks(op) == []


def test_a_function_that_lacks_an_argument_fails() -> None:
    def forgetful(q: Any, k_pages: Any, v_pages: Any, page_table: Any, batch: Any) -> Any:
        return q

    found = verdict("paged_attention", forgetful, "decode")
    assert (found.status, found.gate) == ("failed", "signature")
    assert found.message.startswith("mine takes no scale, sliding_window")


def test_another_way_to_compute_attention_passes() -> None:
    assert verdict("paged_attention", toy_kernels.attention_in_dense, "mixed").status == "passed"


def crashes(*_: Any, **__: Any) -> Any:
    raise TypeError("a shape is wrong")


def narrow(*arguments: Any, **options: Any) -> jax.Array:
    return toy_kernels.attention(*arguments, **options).astype(jnp.bfloat16)


def spoiled_at_one_place(*arguments: Any, **options: Any) -> jax.Array:
    """Right but for one head of one token: little beside the whole."""
    return toy_kernels.attention(*arguments, **options).at[3, 1].multiply(1.01)


def rope_that_zeroes(*arguments: Any, **options: Any) -> Any:
    """Clears what no token of the step writes."""
    q, k_pages, v_pages = rope.rope_kv_write(*arguments, **options)
    return q, k_pages, jnp.nan_to_num(v_pages)


@pytest.mark.parametrize(
    ("op_name", "function", "gate"),
    [
        ("paged_attention", crashes, "it runs"),
        ("paged_attention", narrow, "shapes"),
        ("paged_attention", toy_kernels.attention_with_wrong_scale, "values"),
        ("paged_attention", spoiled_at_one_place, "values"),
        ("paged_attention", toy_kernels.attention_that_reads_padding, "finite"),
        ("rope_kv_write", rope_that_zeroes, "untouched"),
        ("fused_linear", toy_linear.random, "determinism"),
    ],
)
def test_each_gate_finds_its_fault(op_name: str, function: Any, gate: str) -> None:
    found = verdict(op_name, by_name(op_name, function), CASES[op_name])
    assert (found.status, found.gate) == ("failed", gate), found.message


CASES = {"paged_attention": "decode", "rope_kv_write": "plain", "fused_linear": "plain"}
ORDER = {
    "paged_attention": ("q", "k_pages", "v_pages", "page_table", "batch"),
    "rope_kv_write": ("qkv", "cos_sin", "norm", "k_pages", "v_pages", "page", "slot"),
    "fused_linear": ("x", "w"),
}


def by_name(op_name: str, function: Any) -> Any:
    """The function, called with its first arguments by place, as models do."""

    def call(**arguments: Any) -> Any:
        first = [arguments.pop(name) for name in ORDER[op_name]]
        return function(*first, **arguments)

    return call


def test_the_worst_vector_is_named() -> None:
    found = verdict("paged_attention", by_name("paged_attention", spoiled_at_one_place), "decode")
    assert "worst vector, [3, 1]" in found.message


def test_the_registry_knows_what_the_engine_can_override() -> None:
    assert {field.name for field in dataclasses.fields(Kernels)} <= set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_every_case_has_a_cost_and_benchmarks_have_names_of_their_own(name: str) -> None:
    op = find_op(name)
    assert op.benchmarks and len({case.name for case in op.benchmarks}) == len(op.benchmarks)
    for case in (*op.cases, *op.benchmarks, *op.gate_cases(LLAMA_8B)):
        cost = op.cost(case)
        assert cost.bytes >= 0 and cost.flops >= 0


def test_cost_of_decoding_is_the_keys_and_values() -> None:
    op = find_op("paged_attention")
    (case,) = op.find_cases(True, "8B decode 64x2048")
    cost = op.cost(case)
    keys_and_values = 2 * 64 * 2048 * 8 * 128 * 2
    assert keys_and_values < cost.bytes < 1.01 * keys_and_values
    assert cost.flops == 4 * 64 * 2048 * 32 * 128
    (windowed,) = op.find_cases(True, "window 512, decode 64x2048")
    assert 4 * op.cost(windowed).flops == cost.flops


def test_nan_is_where_nobody_may_read_and_nowhere_else() -> None:
    op = find_op("paged_attention")
    (case,) = op.find_cases(False, "mixed, page size 32")
    arguments = op.make(case, SEED)
    poisoned = op.poison(case, arguments)
    nan = np.isnan(np.asarray(poisoned["k_pages"])[:, 0, :, 0])
    assert nan[0].all() and (~nan).sum() == sum(total for _, total in case.lanes)
    for name in ("q", "page_table"):
        assert poisoned[name] is arguments[name]
