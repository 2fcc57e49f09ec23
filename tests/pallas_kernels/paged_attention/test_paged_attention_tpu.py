"""The Mosaic TPU kernel, simulated on a CPU and lowered for a TPU; nothing here runs on one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import mosaic_tpu, paged_attention
from pallas_kernels.paged_attention.cases import PLAIN_CASES, Case, make, poison
from tests.helpers.lowering import lowers_for
from tests.helpers.tpu import SIMULATED, quick_compiling  # noqa: F401
from tests.pallas_kernels.paged_attention.test_paged_attention import oracle

IDS = [case.name for case in PLAIN_CASES]
simulated = functools.partial(mosaic_tpu.paged_attention, interpret=SIMULATED)


def compare(case: Case, actual: jax.Array, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    expected, owned = wanted
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual[owned] - expected[owned]) / np.linalg.norm(expected[owned])
    assert error < (1e-2 if case.dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("case", PLAIN_CASES, ids=IDS)
def test_it_is_softmax_attention_whatever_stands_in_other_pages(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = make(case, seed=4)
    compare(case, simulated(**poison(case, arguments)), oracle(case, arguments))
    assert "RACE" not in capfd.readouterr().out


def test_copies_may_also_happen_at_once() -> None:
    case = Case("mixed", ((1, 5), (7, 7), (1, 600)))
    arguments = make(case, seed=5)
    eager = pltpu.InterpretParams(dma_execution_mode="eager")
    actual = mosaic_tpu.paged_attention(**arguments, interpret=eager)
    compare(case, actual, oracle(case, arguments))


def test_keys_before_the_window_are_not_used() -> None:
    case = Case("window", ((1, 600), (3, 300)), sliding_window=40, padding=0)
    arguments = make(case, seed=6)
    wanted = oracle(case, arguments)
    batch, table = arguments["batch"], np.asarray(arguments["page_table"])
    for lane, (new, total) in enumerate(case.lanes):
        key = np.arange(total - new - 40 + 1)
        place = table[batch.row[lane], key // case.page_size], slice(None), key % case.page_size
        for name in ("k_pages", "v_pages"):
            arguments[name] = arguments[name].at[place].set(jnp.nan)
    compare(case, simulated(**arguments), wanted)


def test_heads_are_divided_among_programs_where_vmem_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("decode", ((1, 30), (1, 40)), heads=8, kv_heads=4, padding=0)
    arguments = make(case, seed=7)
    monkeypatch.setattr(mosaic_tpu, "CHUNK_KEYS", 16)
    monkeypatch.setattr(mosaic_tpu, "VMEM_BYTES", 100 << 10)
    grids = []
    pallas_call = mosaic_tpu.pl.pallas_call

    def noting(*args: Any, **settings: Any) -> Any:
        grids.append(settings["grid_spec"].grid)
        return pallas_call(*args, **settings)

    monkeypatch.setattr(mosaic_tpu.pl, "pallas_call", noting)
    compare(case, simulated(**arguments), oracle(case, arguments))
    assert grids == [(2,)]
    monkeypatch.setattr(mosaic_tpu, "VMEM_BYTES", 1 << 10)
    with pytest.raises(NotImplementedError, match="VMEM"):
        simulated(**arguments)


def test_a_step_without_lanes_leaves_everything_as_it_is() -> None:
    arguments = make(Case("empty", ((1, 5), (1, 9))), seed=8)
    batch = arguments["batch"]
    nothing = {name: jnp.zeros_like(getattr(batch, name)) for name in ("query_len", "kv_len")}
    arguments["batch"] = type(batch)(**{**vars(batch), **nothing})
    np.testing.assert_array_equal(simulated(**arguments), arguments["q"])


# --- lowering -------------------------------------------------------------------------------------

STEPS = {"decode": ((1, 5), (1, 40)), "mixed": ((1, 5), (9, 40))}


def lowered(case: Case) -> str:
    arguments = make(case, seed=0)
    statics = {name: arguments.pop(name) for name in ("scale", "sliding_window")}
    return lowers_for("tpu", functools.partial(paged_attention, **statics), **arguments)


def test_steps_that_only_decode_need_one_kernel() -> None:
    text = lowered(Case("decode", STEPS["decode"], dtype="bfloat16"))
    assert "tpu_custom_call" in text
    assert "paged_decode" in text
    assert "paged_prefill" not in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_it_lowers_for_every_shape_of_pages(head_size: int, page_size: int, dtype: str) -> None:
    text = lowered(Case("", STEPS["mixed"], 8, 2, head_size, page_size, dtype=dtype))
    assert "paged_decode" in text
    assert "paged_prefill" in text


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 7, 8, 16])
def test_it_lowers_for_every_group(group: int) -> None:
    case = Case("", STEPS["mixed"], 8 * group, 8, 128, sliding_window=100, dtype="bfloat16")
    assert "paged_prefill" in lowered(case)


def test_what_it_cannot_do_is_left_to_the_reference() -> None:
    for case in (
        Case("odd pages", STEPS["decode"], page_size=12),
        Case("float16", STEPS["decode"], dtype="float16"),
    ):
        assert "tpu_custom_call" not in lowered(case)


def test_it_is_not_for_cpus() -> None:
    with pytest.raises(NotImplementedError, match="TPU"):
        mosaic_tpu.paged_attention(**make(PLAIN_CASES[0], seed=0))
