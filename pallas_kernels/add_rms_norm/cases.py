"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_rms_norm.types import RMSNorm
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """x [rows, width], with ``terms`` to be added; several are float32, as a split product's."""

    name: str
    rows: int = 5
    width: int = 64
    terms: int = 1
    dtype: str = "float32"


CASES = (
    Case("plain"),
    Case("one row, three terms", rows=1, terms=3),
    Case("width 96, bfloat16", width=96, dtype="bfloat16"),
    Case("width 1000", width=1000),
    Case("four terms, bfloat16", rows=33, width=256, terms=4, dtype="bfloat16"),
    Case("float16", dtype="float16"),
)

CARRIED = {"x": 0}
"""Argument -> the output that may take over its buffer."""
FRESH = ("delta",)
"""Arguments that differ between calls which otherwise are equal."""


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small cases that an implementation must pass before a model with such layers uses it."""
    return tuple(Case(f"{terms} terms", 7, layer.hidden, terms, layer.dtype) for terms in (1, 3))


BENCHMARKS = tuple(
    Case(f"{name}, {rows} rows, {terms} terms", rows, layer.hidden, terms, layer.dtype)
    for name, layer in (("8B", LLAMA_8B), ("1B", LLAMA_1B))
    for rows, terms in ((1, 4), (64, 4), (256, 1), (8192, 1))
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``add_rms_norm``."""
    rng = np.random.default_rng(seed)
    shape = (case.rows, case.width)
    return {
        "x": normal(rng, shape, case.dtype),
        "delta": normal(rng, (case.terms, *shape), case.dtype if case.terms == 1 else "float32"),
        "norm": RMSNorm(normal(rng, (case.width,), case.dtype), 1e-5),
    }


def cost(case: Case) -> Cost:
    """x and the terms are read once, the sum and the normalized rows are written once."""
    size = jnp.dtype(case.dtype).itemsize
    term = size if case.terms == 1 else 4
    numbers = case.rows * case.width
    return Cost(float(numbers * (3 * size + case.terms * term)), float(numbers * (case.terms + 4)))


def specified(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray | None, ...]:
    """Per output the places that the op promises: all of them."""
    return None, None


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as they are: every place is to be read."""
    return arguments
