"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """x [rows, inputs] by a weight [outputs, inputs] (two of them if gated); see the op."""

    name: str
    rows: int = 8
    outputs: int = 96
    inputs: int = 512
    gated: bool = False
    partial: bool = False
    dtype: str = "bfloat16"


CASES = (
    Case("plain"),
    Case("one row", rows=1),
    Case("16 rows", rows=16),
    Case("gate", gated=True),
    Case("partial sums", partial=True),
    Case("three rows, partial sums", rows=3, partial=True),
    Case("33 rows, gate", rows=33, gated=True),
    Case("inputs 384, float16", inputs=384, gated=True, dtype="float16"),
)

FRESH = ("x",)
"""Arguments that differ between calls which otherwise are equal."""


def of_layer(layer: LayerShape, rows: int) -> dict[str, Case]:
    """A layer's products, by what they make."""
    qkv = (layer.heads + 2 * layer.kv_heads) * layer.head_size
    attended = layer.heads * layer.head_size
    hidden, ffn, dtype = layer.hidden, layer.ffn, layer.dtype
    return {
        "qkv": Case("", rows, qkv, hidden, partial=True, dtype=dtype),
        "out": Case("", rows, hidden, attended, partial=True, dtype=dtype),
        "up": Case("", rows, ffn, hidden, gated=True, dtype=dtype),
        "down": Case("", rows, hidden, ffn, partial=True, dtype=dtype),
    }


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Products that an implementation must pass before a model with such layers uses it."""
    first = "qkv" if layer.latent_size is None else "down"
    return tuple(
        replace(of_layer(layer, rows)[which], name=f"{which}, {rows} rows")
        for rows in (3, 40)
        for which in (first, "up")
    )


BENCHMARKS = tuple(
    replace(case, name=f"{model} {which}, {rows} rows")
    for model, layer in (("8B", LLAMA_8B), ("1B", LLAMA_1B))
    for rows in (1, 8, 16, 64, 256, 2048)
    for which, case in of_layer(layer, rows).items()
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``fused_linear``."""
    rng = np.random.default_rng(seed)
    parts = (2,) if case.gated else ()
    x = normal(rng, (case.rows, case.inputs), case.dtype)
    w = normal(rng, (*parts, case.outputs, case.inputs), case.dtype)
    return {
        "x": x,
        "w": w * case.inputs**-0.5,
        "silu_gated": case.gated,
        "partial": case.partial,
    }


def cost(case: Case) -> Cost:
    """The weight and x are read once and the result is written once."""
    weights = (2 if case.gated else 1) * case.outputs * case.inputs
    vectors = case.rows * (case.inputs + case.outputs)
    size = jnp.dtype(case.dtype).itemsize
    return Cost(float((weights + vectors) * size), 2.0 * case.rows * weights)


def promised(case: Case, output: jax.Array) -> jax.Array:
    """What the op promises of an output: of partial sums, their total."""
    wide = jnp.promote_types(output.dtype, jnp.float32)
    return output.sum(0, dtype=wide) if case.partial else output
