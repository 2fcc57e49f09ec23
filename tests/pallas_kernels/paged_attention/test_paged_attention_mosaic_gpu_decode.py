"""The Mosaic GPU kernels for decoding, simulated on a CPU, lowered for Hopper, and run on one.

The simulation computes the kernels' matrix products as ordinary ones, and knows no registers; all
else is the kernels' own.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

from pallas_kernels.paged_attention import (
    mosaic_gpu,
    mosaic_gpu_decode,
    mosaic_gpu_shape,
    reference,
)
from pallas_kernels.paged_attention.cases import DECODE, MIXED, PLAIN_CASES, Case, make, poison
from pallas_kernels.paged_attention.mosaic_gpu_shape import (
    DecodeShape,
    decode_memory,
    merge_memory,
)
from tests.helpers.lowering import lowers_for

STATIC = ("scale", "sliding_window")
HEAD_SIZES = range(16, 257, 16)
SIMULATED_SECONDS = 200
SHARED_MEMORY = 227 << 10  # bytes of a block on a Hopper GPU
SHARED = tuple(
    replace(case, dtype=dtype)
    for case, dtype in itertools.product(PLAIN_CASES, ("bfloat16", "float16"))
    if case.name.startswith("decode") and case.head_size % 16 == 0
)
SIMULATED = tuple(
    # Shorter, since the simulation is slow.
    replace(case, lanes=((1, 1), (1, 17), (1, 150)))
    for case in SHARED
    if (case.name, case.dtype)
    in (
        ("decode, group 7", "bfloat16"),
        ("decode, group 16", "float16"),
        ("decode, head size 256", "bfloat16"),
        ("decode, window", "float16"),
    )
)
SHAPES = tuple(
    Case(
        f"head size {size}, group {group}, pages of {page}, window {window}",
        ((1, 5), (1, 900), (1, 64), (1, 130)),
        heads=2 * group,
        kv_heads=2,
        head_size=size,
        page_size=page,
        sliding_window=window,
        dtype=dtype,
        padding=3,
    )
    for size, group, page, window, dtype in zip(
        HEAD_SIZES,
        range(1, 17),
        itertools.cycle((8, 16, 32, 64)),
        itertools.cycle((None, None, 100)),
        itertools.cycle(("bfloat16", "float16")),
    )
)


@pytest.fixture
def guarded() -> Iterator[None]:
    """Ends the process if a test takes too long: where a simulated thread fails, the others may
    wait forever, and no exception reaches them."""
    faulthandler.dump_traceback_later(SIMULATED_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def attend(
    function: Any, case: Case, arguments: dict[str, Any], times: int = 1, **kwargs: Any
) -> list[np.ndarray]:
    """q after ``function``, in float64, with NaN wherever nobody may read keys and values."""
    poisoned = poison(case, arguments)
    static = {name: poisoned.pop(name) for name in STATIC}
    run = jax.jit(functools.partial(function, **static, **kwargs))
    outputs = (run(**poisoned).astype(jnp.float32) for _ in range(times))
    return [np.asarray(out, np.float64) for out in outputs]


def check(actual: np.ndarray, arguments: dict[str, Any], lengths: tuple[int, ...] = (1,)) -> None:
    """The queries of lanes with ``lengths`` queries hold their attention, others are unchanged."""
    batch = arguments["batch"]
    starts, counts = (np.asarray(a) for a in (batch.query_start, batch.query_len))
    done = np.zeros(len(actual), bool)
    for start, count in zip(starts, counts):
        done[start : start + count] |= not lengths or count in lengths
    names = ("q", "k_pages", "v_pages")
    exact = arguments | {name: arguments[name].astype(jnp.float32) for name in names}
    expected = np.asarray(reference.paged_attention(**exact), np.float64)
    unchanged = np.asarray(exact["q"], np.float64)
    np.testing.assert_array_equal(actual[~done], unchanged[~done])
    error = np.linalg.norm(actual[done] - expected[done]) / np.linalg.norm(expected[done])
    assert error < 1e-2


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("case", SIMULATED, ids=lambda case: f"{case.name} {case.dtype}")
def test_it_equals_the_reference_whatever_stands_in_other_pages(case):
    # Queries behind the last one are read, and not used.
    simulated = InterpretGPUParams(out_of_bounds_reads="uninitialized")
    arguments = make(case, seed=1)
    (actual,) = attend(mosaic_gpu.decode, case, arguments, interpret=simulated)
    check(actual, arguments)


@pytest.mark.usefixtures("guarded")
def test_many_parts_are_merged_alike_each_time_without_races(monkeypatch, capfd):
    # Groups of 8 fill the rows that are copied: of smaller ones, the rows behind are read while
    # their outputs may be written.
    for module in (mosaic_gpu_decode, mosaic_gpu_shape):  # more parts than slots
        monkeypatch.setattr(module, "PARTS_AT_ONCE", 2)
    lanes = ((1, 500), (5, 9))
    case = Case("", lanes, heads=8, kv_heads=1, head_size=16, page_size=64, dtype="bfloat16")
    arguments = make(case, seed=4)
    assert int(arguments["batch"].decode_count[0]) == 4
    simulated = InterpretGPUParams(detect_races=True)
    first, second = attend(mosaic_gpu.decode, case, arguments, 2, interpret=simulated)
    check(first, arguments)
    np.testing.assert_array_equal(first, second)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_it_lowers_for_cuda(case):
    arguments = make(case, seed=0)
    static = {name: arguments.pop(name) for name in STATIC}
    run = functools.partial(mosaic_gpu.paged_attention_mosaic_only, **static)
    text = lowers_for("cuda", run, **arguments)
    assert text.count("mosaic_gpu_v2") == 2  # attention and merge
    assert "triton" not in text


def test_mixed_batches_lower_for_cuda_without_triton():
    arguments = make(Case("", MIXED, heads=8, dtype="bfloat16"), seed=0)
    static = {name: arguments.pop(name) for name in STATIC}
    run = functools.partial(mosaic_gpu.paged_attention_mosaic_only, **static)
    text = lowers_for("cuda", run, **arguments)
    assert text.count("mosaic_gpu_v2") == 3
    assert "triton" not in text


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_shared_memory_suffices(head_size):
    shape = DecodeShape(jnp.bfloat16, 32, 4, head_size, 8, 1, 1.0, None, 132, None)
    for memory in (decode_memory(shape), merge_memory(shape)):
        arrays = [getattr(ref, "refs", [ref])[0] for ref in memory.values()]
        sizes = [
            math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
            for array in arrays
            if hasattr(array, "dtype")  # barriers take 8 bytes each
        ]
        assert sum(-(-size // 1024) * 1024 for size in sizes) + 1024 <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHARED + SHAPES, ids=lambda case: f"{case.name} {case.dtype}")
def test_on_the_gpu_it_equals_the_reference(case):
    arguments = make(case, seed=3)
    first, second = attend(mosaic_gpu.decode, case, arguments, 2)
    check(first, arguments)
    np.testing.assert_array_equal(first, second)


@pytest.mark.gpu
def test_on_the_gpu_mixed_batches_need_no_triton():
    case = Case("", MIXED, heads=8, dtype="bfloat16")
    arguments = make(case, seed=5)
    (actual,) = attend(mosaic_gpu.paged_attention_mosaic_only, case, arguments)
    check(actual, arguments, lengths=())


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float32"}, "no version for q in float32"),
        ({"head_size": 72}, "heads of 72"),
        ({"head_size": 288}, "heads of 288"),
        ({"page_size": 4}, "pages of 4"),
        ({"page_size": 128}, "pages of 128"),
        ({"heads": 128, "kv_heads": 1}, "groups of 128 heads"),
    ],
)
def test_what_it_can_not_do_is_left_to_others(changes, reason):
    case = replace(Case("", DECODE, heads=8, dtype="bfloat16"), **changes)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.decode(**make(case, seed=0), interpret=InterpretGPUParams())


def test_it_is_for_hopper_gpus():
    case = Case("", DECODE, heads=8, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match="Hopper"):
        mosaic_gpu.paged_attention_mosaic_only(**make(case, seed=0))


WITHOUT_TRITON = """
import functools, sys
sys.modules["jax.experimental.pallas.triton"] = None  # importing it fails
from pallas_kernels.paged_attention import IMPLEMENTATIONS, paged_attention
from pallas_kernels.paged_attention.cases import MIXED, Case, make
from tests.helpers.lowering import lowers_for

arguments = make(Case("", MIXED, heads=8, dtype="bfloat16"), seed=0)
for name in ("mosaic_gpu", "triton"):
    try:
        IMPLEMENTATIONS[name](**arguments)
    except NotImplementedError as reason:
        assert "Triton backend" in str(reason), reason
static = {name: arguments.pop(name) for name in ("scale", "sliding_window")}
text = lowers_for("cuda", functools.partial(paged_attention, **static), **arguments)
assert text.count("mosaic_gpu_v2") == 3
"""


def test_it_takes_over_where_jax_has_no_triton_backend():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=SIMULATED_SECONDS)
