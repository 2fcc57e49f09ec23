"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fused_linear.types import RMSNorm


@dataclass(frozen=True)
class Case:
    """x [rows, inputs] by a weight [outputs, inputs] (two of them if gated)."""

    name: str
    rows: int = 8
    outputs: int = 96
    inputs: int = 512
    normalizes: bool = False
    gated: bool = False
    adds: bool = False
    dtype: str = "bfloat16"


CASES = (
    Case("plain"),
    Case("one row", rows=1),
    Case("three rows, residual", rows=3, adds=True),
    Case("16 rows, norm", rows=16, normalizes=True),
    Case("norm and residual", normalizes=True, adds=True),
    Case("norm and gate", normalizes=True, gated=True),
    Case("inputs 384, float16", inputs=384, gated=True, dtype="float16"),
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``fused_linear``."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)

    parts = (2,) if case.gated else ()
    return {
        "x": normal(case.rows, case.inputs),
        "w": normal(*parts, case.outputs, case.inputs) * case.inputs**-0.5,
        "norm": RMSNorm(normal(case.inputs), 1e-5) if case.normalizes else None,
        "silu_gated": case.gated,
        "residual": normal(case.rows, case.outputs) if case.adds else None,
    }
