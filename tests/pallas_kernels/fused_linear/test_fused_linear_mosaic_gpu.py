"""The Mosaic GPU kernel, simulated on a CPU, lowered for a Hopper GPU, and run on one.

The simulation computes the kernel's matrix products as ordinary ones; all else is the kernel's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on
from jax.sharding import AbstractMesh

from pallas_kernels.fused_linear import mosaic_gpu
from pallas_kernels.fused_linear.cases import Case, make, of_layer, promised
from pallas_kernels.fused_linear.mosaic_gpu import Config
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, LayerShape
from tests.helpers.lowering import DEVICES, lowers_for

STATIC = ("silu_gated", "partial")
ROWS = (65, 128, 256, 512, 1024, 2048, 4096, 8192)
SMALL = Config(rows=128, outputs=64, stages=3, band=2, pair=1)
TALL = Config(rows=256, outputs=64, stages=2, band=1, pair=1)
SPLIT = Config(rows=128, outputs=64, stages=3, band=1, pair=1, splits=3)
PAIRED = Config(rows=128, outputs=64, stages=3, band=2, pair=2)


def check(function: Callable[..., jax.Array], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    x, w = (np.asarray(arguments[name], np.float32) for name in ("x", "w"))
    if case.gated:
        gate, up = x @ w[0].T, x @ w[1].T
        expected = gate / (1 + np.exp(-gate)) * up
    else:
        expected = x @ w.T
    actual = promised(case, jax.jit(function, static_argnames=STATIC)(**arguments))
    assert actual.shape == expected.shape
    error = np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)
    assert error < 1e-2


def shapes(case: Case) -> tuple[Any, Any]:
    """x and w of a case, without their numbers."""
    w = (*((2,) if case.gated else ()), case.outputs, case.inputs)
    x = (case.rows, case.inputs)
    return jax.ShapeDtypeStruct(x, case.dtype), jax.ShapeDtypeStruct(w, case.dtype)


def options(case: Case) -> dict[str, bool]:
    return {"silu_gated": case.gated, "partial": case.partial}


def guess(case: Case) -> Config:
    return mosaic_gpu.guess(*shapes(case), **options(case))


def lower(case: Case, config: Config) -> str:
    function = functools.partial(mosaic_gpu.fused_linear, **options(case), config=config)
    return lowers_for("cuda", function, *shapes(case))


@pytest.mark.parametrize(
    "case, config",
    [
        (Case("two tiles of rows", 130, 256, 256, gated=True), SMALL),
        (Case("a last band of one tile", 300, 128, 192), SMALL),
        (Case("tall tiles, float16", 200, 128, 256, gated=True, dtype="float16"), TALL),
        (Case("a guess, results in pieces of 16", 65, 48, 128, gated=True), None),
        (Case("pieces take turns", 65, 128, 64, dtype="float16"), TALL._replace(outputs=128)),
        (Case("one partial sum", 65, 128, 64, partial=True), None),
        (Case("three partial sums", 130, 128, 384, partial=True), SPLIT),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_it_follows_the_formulas(case: Case, config: Config | None) -> None:
    config = config or guess(case)
    function = functools.partial(mosaic_gpu.fused_linear, config=config, interpret=True)
    check(function, case, seed=1)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter knows no clusters yet")
@pytest.mark.parametrize("rows", [130, 300])
def test_pairs_of_blocks_share_the_weight(rows: int) -> None:
    function = functools.partial(mosaic_gpu.fused_linear, config=PAIRED, interpret=True)
    check(function, Case("", rows, 128, 256, gated=True), seed=2)


def test_its_copies_and_products_do_not_race(capfd: pytest.CaptureFixture[str]) -> None:
    # Several tiles for each block, and more tiles of operands than stages.
    function = functools.partial(
        mosaic_gpu.fused_linear, config=SMALL, interpret=InterpretGPUParams(detect_races=True)
    )
    check(function, Case("", 256, 192, 256, gated=True), seed=3)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", [LLAMA_1B, LLAMA_8B], ids=["1B", "8B"])
def test_guessed_configs_lower_for_cuda(model: LayerShape, rows: int) -> None:
    for case in of_layer(model, rows).values():
        assert "mosaic_gpu" in lower(case, guess(case))


@pytest.mark.parametrize("gated", [False, True])
def test_the_candidates_lower_for_cuda(gated: bool) -> None:
    case = Case("", 300, 1536, 512, gated=gated)
    found = list(mosaic_gpu.candidates(*shapes(case), silu_gated=gated))
    assert {config.pair for config in found} == {1, 2}
    assert len(found) == len(set(found))
    for config in found:
        assert "mosaic_gpu" in lower(case, config)


def test_few_tiles_are_split() -> None:
    case = Case("", 256, 1024, 2048, partial=True)
    unsplit = dataclasses.replace(case, partial=False)
    mesh = AbstractMesh((), (), abstract_device=DEVICES["cuda"])
    with jax.sharding.use_abstract_mesh(mesh):
        found, whole = (
            {config.splits: config for config in mosaic_gpu.candidates(*shapes(c), **options(c))}
            for c in (case, unsplit)
        )
    assert max(found) == 8 and set(whole) == {1}
    for config in found.values():
        assert "mosaic_gpu" in lower(case, config)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("config", [SMALL, TALL, PAIRED], ids=str)
def test_on_the_gpu_split_sums_follow_the_formulas(config: Config, splits: int) -> None:
    case = Case("", 300, 3584, 1024, partial=True)
    function = functools.partial(mosaic_gpu.fused_linear, config=config._replace(splits=splits))
    check(function, case, seed=6)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, SMALL, TALL, PAIRED], ids=str)
@pytest.mark.parametrize("rows", [65, 130, 1000])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_the_gpu_it_follows_the_formulas(
    config: Config | None, rows: int, gated: bool, dtype: str
) -> None:
    case = Case("", rows, 3584, 1024, gated=gated, dtype=dtype)
    function = functools.partial(mosaic_gpu.fused_linear, config=config or guess(case))
    check(function, case, seed=4)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [128, 300, 2048])
@pytest.mark.parametrize("model", [LLAMA_1B, LLAMA_8B], ids=["1B", "8B"])
def test_on_the_gpu_real_layers_follow_the_formulas(model: LayerShape, rows: int) -> None:
    for case in of_layer(model, rows).values():
        check(functools.partial(mosaic_gpu.fused_linear, config=guess(case)), case, seed=5)


@pytest.mark.parametrize(
    "case, config, reason",
    [
        (Case("", 65, 256, 256, dtype="float32"), None, "bfloat16 and float16 only"),
        (Case("", 64, 256, 256), None, "64 rows"),
        (Case("", 65, 256, 256), None, "cuBLAS may be faster"),
        (Case("", 65, 256, 96), SMALL, "no multiple of 64"),
        (Case("", 65, 96, 256), SMALL, "96 outputs"),
        (Case("", 65, 128, 256, partial=True), SPLIT, "no multiple of 192"),
        (Case("", 65, 128, 384), SPLIT, "only partial sums"),
        (Case("", 65, 256, 256), SMALL._replace(rows=64), "none for the tensor cores"),
        (Case("", 65, 512, 256), SMALL._replace(outputs=512), "none for the tensor cores"),
        (Case("", 65, 256, 256), TALL._replace(outputs=256), "registers"),
        (Case("", 65, 256, 256), SMALL._replace(stages=1), "1 stages"),
        (Case("", 65, 256, 256, gated=True), SMALL._replace(stages=9), "shared memory"),
    ],
)
def test_what_it_can_not_do_is_left_to_others(
    case: Case, config: Config | None, reason: str
) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.fused_linear(**make(case, seed=0), config=config, interpret=True)


@pytest.mark.parametrize("case", [Case("", 65, 256, 96), Case("", 65, 100, 256)], ids=str)
def test_without_tiles_there_is_nothing_to_guess(case: Case) -> None:
    with pytest.raises(NotImplementedError, match="no tiles for"):
        guess(case)


def test_it_is_for_hopper_gpus() -> None:
    with pytest.raises(NotImplementedError, match="Hopper"):
        mosaic_gpu.fused_linear(**make(Case("", 65, 256, 256), seed=0), config=SMALL)


def test_neighbouring_numbers_of_rows_share_a_tuned_config() -> None:
    keys = {
        mosaic_gpu.tuning_key(*shapes(Case("", rows, 256, 128, gated=True)), silu_gated=True)
        for rows in (129, 200, 256)
    }
    assert keys == {"256x256x128 gated"}
