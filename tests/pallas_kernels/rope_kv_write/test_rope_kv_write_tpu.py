"""The Mosaic TPU kernel, simulated on a CPU and lowered for a TPU; nothing here runs on one."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope_kv_write import mosaic_tpu, reference, rope_kv_write
from pallas_kernels.rope_kv_write.cases import CASES, Case, make, poison
from tests.helpers.lowering import lowers_for
from tests.helpers.tpu import SIMULATED, quick_compiling  # noqa: F401

IDS = [case.name for case in CASES]
simulated = functools.partial(mosaic_tpu.rope_kv_write, interpret=SIMULATED)


def compare(arguments: dict[str, Any]) -> None:
    """The kernel and the reference give the same bits, but for the padding's page."""
    actual, expected = (
        [np.asarray(x, np.float32) for x in function(**arguments)]
        for function in (simulated, reference.rope_kv_write)
    )
    np.testing.assert_array_equal(actual[0], expected[0])
    for pages, wanted in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(pages[1:], wanted[1:])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_it_gives_the_reference_s_bits(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    compare(poison(case, make(case, seed=4)))
    assert "RACE" not in capfd.readouterr().out


def consecutive(case: Case) -> dict[str, Any]:
    """Arguments whose tokens follow each other through pages, from the middle of one on."""
    arguments = make(case, seed=5)
    place = case.page_size + 5 + np.arange(case.tokens)
    return arguments | {
        "page": jnp.asarray(place // case.page_size, jnp.int32),
        "slot": jnp.asarray(place % case.page_size, jnp.int32),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokens_of_a_prompt_share_pages(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also across the blocks that a long step is cut into, whose copies must not overtake."""
    monkeypatch.setattr(mosaic_tpu, "BLOCK_TOKENS", 8)
    compare(consecutive(Case("prompt", tokens=27, padding=0, dtype=dtype)))
    monkeypatch.setattr(mosaic_tpu, "MANY_TOKENS", 20)
    compare(consecutive(Case("long prompt", tokens=27, padding=0, dtype=dtype)))
    assert "RACE" not in capfd.readouterr().out


def test_pages_may_be_narrower_than_the_activations() -> None:
    case = Case("wide activations", padding=0)
    arguments = make(case, seed=6)
    compare(arguments | {n: arguments[n].astype(jnp.bfloat16) for n in ("k_pages", "v_pages")})


# --- lowering -------------------------------------------------------------------------------------


def lowered(case: Case) -> str:
    arguments = make(case, seed=0)
    function = functools.partial(rope_kv_write, dtype=arguments.pop("dtype"))
    return lowers_for("tpu", function, **arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [8, 512])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_it_lowers_for_every_shape(head_size: int, page_size: int, tokens: int, dtype: str) -> None:
    case = Case("", tokens, head_size=head_size, page_size=page_size, dtype=dtype)
    text = lowered(case)
    assert "tpu_custom_call" in text
    assert "kv_write" in text


def test_the_pages_change_in_place() -> None:
    arguments = make(CASES[0], seed=0)
    dtype = arguments.pop("dtype")
    function = functools.partial(rope_kv_write, dtype=dtype)
    assert "output_operand_aliases" in lowers_for("tpu", function, **arguments)


def test_what_it_cannot_do_is_left_to_the_reference() -> None:
    base = Case("", head_size=8)
    for case in (
        replace(base, page_size=12),
        replace(base, dtype="float16"),
        replace(base, tokens=mosaic_tpu.MAX_TOKENS + 1, kv_heads=1, group=1),
    ):
        assert "tpu_custom_call" not in lowered(case)


def test_it_is_not_for_cpus() -> None:
    with pytest.raises(NotImplementedError, match="TPU"):
        mosaic_tpu.rope_kv_write(**make(CASES[0], seed=0))
