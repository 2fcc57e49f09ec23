"""The Mosaic GPU kernel, simulated on a CPU, lowered for a Hopper GPU, and run on one.

The simulation computes the kernel's matrix products as ordinary ones; all else is the kernel's own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

from pallas_kernels.paged_attention import mosaic_gpu, reference
from pallas_kernels.paged_attention.cases import MIXED, PLAIN_CASES, Case, make, poison
from tests.helpers.lowering import lowers_for

STATIC = ("scale", "sliding_window")
LONG = ((300, 700), (1, 9), (131, 131), (65, 1000), (2, 400))
TILED = tuple(
    replace(case, dtype=dtype)
    for case in PLAIN_CASES
    if case.name.startswith("mixed") and case.head_size % 16 == 0
    for dtype in ("bfloat16", "float16")
)
SHAPES = tuple(
    Case(
        f"head size {size}, group {group}, pages of {page}, window {window}",
        LONG,
        heads=2 * group,
        kv_heads=2,
        head_size=size,
        page_size=page,
        sliding_window=window,
        dtype="bfloat16",
        padding=3,
    )
    for size, group, page, window in (
        (64, 1, 16, None),
        (64, 4, 16, None),
        (64, 16, 64, 128),
        (80, 8, 16, None),
        (96, 1, 32, None),
        (96, 4, 16, 300),
        (128, 1, 16, 100),
        (128, 2, 64, None),
        (128, 3, 16, None),
        (128, 4, 16, None),
        (128, 5, 16, 1),
        (128, 7, 32, None),
        (128, 8, 16, None),
        (128, 16, 16, 4096),
        (192, 4, 32, None),
        (256, 2, 16, None),
        (256, 8, 64, 200),
    )
)


def check(case: Case, arguments: dict[str, Any], **kwargs: Any) -> None:
    """The tiles' queries hold their attention, all others what they held."""
    batch = arguments["batch"]
    starts, lengths = (np.asarray(a) for a in (batch.query_start, batch.query_len))
    tiled = np.zeros(arguments["q"].shape[0], bool)
    for start, length in zip(starts[lengths > 1], lengths[lengths > 1]):
        tiled[start : start + length] = True
    names = ("q", "k_pages", "v_pages")
    exact = arguments | {name: arguments[name].astype(jnp.float32) for name in names}
    expected = np.asarray(reference.paged_attention(**exact), np.float64)
    static = {name: arguments[name] for name in STATIC}
    run = jax.jit(functools.partial(mosaic_gpu.prefill, **static, **kwargs))
    poisoned = poison(case, arguments)
    actual = run(**{name: poisoned[name] for name in poisoned if name not in STATIC})
    actual, q = (np.asarray(x.astype(jnp.float32), np.float64) for x in (actual, arguments["q"]))
    np.testing.assert_array_equal(actual[~tiled], q[~tiled])
    error = np.linalg.norm(actual[tiled] - expected[tiled]) / np.linalg.norm(expected[tiled])
    assert error < 1e-2


@pytest.mark.parametrize(
    "case",
    [
        Case("ragged", ((37, 60), (1, 30), (7, 7)), heads=6, head_size=96, dtype="bfloat16"),
        Case(
            "window",
            ((19, 300),),
            heads=16,
            kv_heads=1,
            page_size=32,
            sliding_window=50,
            dtype="float16",
        ),
    ],
    ids=lambda case: case.name,
)
def test_it_equals_the_reference_whatever_stands_in_other_pages(case):
    # Queries behind the last one are read, and not used.
    simulated = InterpretGPUParams(out_of_bounds_reads="uninitialized")
    check(case, make(case, seed=1), interpret=simulated)


def test_its_copies_and_products_do_not_race(capfd):
    # Two tiles of queries, three of keys in two slots, nothing ragged and nothing to clear: the
    # consumers clear values together, and a ragged tile reads queries that another one overwrites.
    case = Case(
        "whole",
        ((64, 384),),
        heads=4,
        kv_heads=1,
        head_size=128,
        page_size=64,
        dtype="bfloat16",
        padding=0,
    )
    check(case, make(case, seed=2), interpret=InterpretGPUParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


def test_the_tiles_that_see_the_most_keys_come_first():
    batch = make(Case("", ((40, 40), (1, 900), (33, 200)), heads=8), seed=0)["batch"]
    lane, start = (np.asarray(a) for a in (batch.tile_lane, batch.tile_start))
    position = (batch.kv_len - batch.query_len)[lane] + start
    used = start < np.asarray(batch.query_len)[lane]
    assert position[used].tolist() == [199, 167, 32, 0]
    assert used.tolist() == sorted(used, reverse=True)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_it_lowers_for_cuda(case):
    arguments = make(case, seed=0)
    static = {name: arguments.pop(name) for name in STATIC}
    text = lowers_for("cuda", functools.partial(mosaic_gpu.paged_attention, **static), **arguments)
    assert "mosaic_gpu" in text  # the tiles
    assert "triton" in text  # the lane with one query


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES + TILED, ids=lambda case: f"{case.name} {case.dtype}")
def test_on_the_gpu_it_equals_the_reference(case):
    try:
        check(case, make(case, seed=3))
    except NotImplementedError as reason:
        assert case in TILED, reason


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float32"}, "no version for q in float32"),
        ({"head_size": 72}, "heads of 72"),
        ({"head_size": 288}, "heads of 288"),
        ({"page_size": 4}, "pages of 4"),
        ({"heads": 64}, "tiles of 4 tokens x 32 heads"),
        ({"lanes": ((1, 5), (1, 7))}, "batches with tiles"),
    ],
)
def test_what_it_can_not_do_is_left_to_others(changes, reason):
    case = replace(Case("", MIXED, heads=8, dtype="bfloat16"), **changes)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.prefill(**make(case, seed=0), interpret=InterpretGPUParams())


def test_it_is_for_hopper_gpus():
    case = Case("", MIXED, heads=8, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match="Hopper"):
        mosaic_gpu.paged_attention(**make(case, seed=0))
