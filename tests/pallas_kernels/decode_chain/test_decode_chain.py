"""Every implementation against the formulas in float64 numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

from pallas_kernels.add_rms_norm import RMSNorm
from pallas_kernels.decode_chain import decode_chain, mosaic_gpu, reference
from pallas_kernels.decode_chain.cases import BENCHMARKS, CASES, Case, make
from pallas_kernels.decode_chain.mosaic_gpu import Product
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
KERNEL_CASES = [case for case in CASES if case.dtype != "float32"]
KERNEL_IDS = [case.name for case in KERNEL_CASES]
LAYERS = [case for case in BENCHMARKS if "head" not in case.name]


def oracle(x: Any, attended: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of float64 arrays, in float64."""
    out, norm, up, down, next_norm, last = weights

    def normalized(x: np.ndarray, norm: RMSNorm) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + norm.eps) * norm.scale

    x = x + attended @ out.T
    gate, value = normalized(x, norm) @ up[0].T, normalized(x, norm) @ up[1].T
    x = x + (gate / (1 + np.exp(-gate)) * value) @ down.T
    return x, normalized(x, next_norm) @ last.T


def check(function: Callable[..., Any], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), arguments)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    outputs, expected = function(**arguments), oracle(**wide)
    assert [y.dtype for y in outputs] == [jnp.dtype(case.dtype), jnp.float32]
    for actual, wanted in zip(outputs, expected, strict=True):
        error = np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < tolerance


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_follows_the_formulas(case: Case) -> None:
    check(reference.decode_chain, case, seed=1)


@pytest.mark.parametrize("case", KERNEL_CASES[:2], ids=KERNEL_IDS[:2])
def test_mosaic_gpu_interpreted_follows_the_formulas(case: Case) -> None:
    """One block with one consumer: the interpreter has nobody to wait for."""
    check(functools.partial(mosaic_gpu.decode_chain, interpret=InterpretGPUParams()), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=KERNEL_IDS)
def test_mosaic_gpu_on_the_gpu_follows_the_formulas(case: Case) -> None:
    check(jax.jit(mosaic_gpu.decode_chain), case, seed=3)


@pytest.mark.gpu
def test_one_call_leaves_nothing_behind_for_the_next() -> None:
    arguments = make(CASES[0], seed=4)
    chain = jax.jit(mosaic_gpu.decode_chain)
    first = chain(**arguments)
    for _ in range(100):
        again = chain(**arguments)
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("case", [*KERNEL_CASES, *LAYERS], ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case) -> None:
    arguments = jax.eval_shape(lambda: make(case, seed=0))
    assert "decode_chain" in lowers_for("cuda", mosaic_gpu.decode_chain, **arguments)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (CASES[-2], "bfloat16 or float16"),
        (Case("odd", ffn=72), "cuts weights into 4 x 256"),
        (Case("wide", inputs=51200), "51200 inputs leave no memory"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_others(case: Case, reason: str) -> None:
    arguments = jax.eval_shape(lambda: make(case, seed=0))
    with pytest.raises(NotImplementedError, match=reason):
        lowers_for("cuda", mosaic_gpu.decode_chain, **arguments)


def test_norms_in_another_dtype_are_left_to_others() -> None:
    arguments = make(CASES[0], seed=0)
    norm = RMSNorm(jnp.ones(CASES[0].hidden), 1e-5)
    weights = arguments["weights"]._replace(norm=norm)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        lowers_for("cuda", mosaic_gpu.decode_chain, **arguments | {"weights": weights})


@given(st.integers(1, 400), st.integers(0, 10**6), st.integers(1, 140), st.sampled_from([1, 2, 3]))
def test_blocks_and_consumers_share_out_all_units(
    units: int, before: int, blocks: int, consumers: int
) -> None:
    product = Product(units * mosaic_gpu.ROWS, 256, 1, before)
    done = []
    for block in range(blocks):
        first = int(product.first(block, blocks))
        count = int(product.share(block, blocks))
        shares = (product.share(block, blocks, n, consumers) for n in range(consumers))
        assert sum(map(int, shares)) == count
        done += [first + n * blocks for n in range(count)]
        # The turn goes on where the products before have left it.
        assert (first + before) % blocks == block
    assert sorted(done) == list(range(units))


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = make(CASES[0], seed=0)
    with pytest.raises(ValueError, match="don't fit"):
        decode_chain(**arguments | {"attended": jnp.zeros((1, 8), jnp.bfloat16)})
    wrong = arguments["weights"]._replace(next=jnp.zeros((8, 8), jnp.bfloat16))
    with pytest.raises(ValueError, match="the next weight"):
        decode_chain(**arguments | {"weights": wrong})
