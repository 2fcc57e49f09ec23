"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_rms_norm import RMSNorm
from pallas_kernels.decode_chain.types import ChainWeights
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """One token: attention's ``inputs`` numbers, and ``outputs`` of the next product."""

    name: str
    inputs: int = 256
    hidden: int = 256
    ffn: int = 256
    outputs: int = 32
    dtype: str = "bfloat16"


CASES = (
    Case("plain"),
    Case("cut rows, float16", inputs=2304, outputs=12, dtype="float16"),
    Case("widths that are no powers of two", inputs=1280, hidden=768, ffn=1792, outputs=1156),
    Case("cut rows everywhere", inputs=4096, hidden=2560, ffn=3072, outputs=64),
    Case("float32", dtype="float32"),
    Case("odd sizes", inputs=40, hidden=24, ffn=72, outputs=7, dtype="float32"),
)
"""The first two are small enough for the interpreter."""

FRESH = ("x",)
"""Arguments that differ between calls which otherwise are equal."""


def of_layer(layer: LayerShape, name: str, outputs: int | None = None) -> Case:
    """A model's layer, with the next one's queries, keys and values behind it if not told else."""
    outputs = outputs or (layer.heads + 2 * layer.kv_heads) * layer.head_size
    inputs = layer.heads * layer.head_size
    return Case(name, inputs, layer.hidden, layer.ffn, outputs, layer.dtype)


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small steps that an implementation must pass before a model with such layers uses it."""
    if layer.num_experts or layer.latent_size or layer.activation != "silu":
        return ()
    ffn, outputs = min(layer.ffn, 1024), 256  # a whole layer's weights are too many to draw
    return (replace(of_layer(layer, "part of a layer", outputs), ffn=ffn),)


BENCHMARKS = (
    of_layer(LLAMA_1B, "1B"),
    of_layer(LLAMA_1B, "1B, head", outputs=128256),
    of_layer(LLAMA_8B, "8B"),
    of_layer(LLAMA_8B, "8B, head", outputs=128256),
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``decode_chain``."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> jax.Array:
        return (normal(rng, shape, "float32") * shape[-1] ** -0.5).astype(case.dtype)

    def norm() -> RMSNorm:
        return RMSNorm(1 + normal(rng, (case.hidden,), case.dtype) / 4, 1e-5)

    return {
        "x": normal(rng, (1, case.hidden), case.dtype),
        "attended": normal(rng, (1, case.inputs), case.dtype),
        "weights": ChainWeights(
            weight(case.hidden, case.inputs),
            norm(),
            weight(2, case.ffn, case.hidden),
            weight(case.hidden, case.ffn),
            norm(),
            weight(case.outputs, case.hidden),
        ),
    }


def cost(case: Case) -> Cost:
    """Every weight is read once, and multiplied by one number."""
    weights = case.hidden * (case.inputs + 3 * case.ffn + case.outputs)
    return Cost(float(weights * jnp.dtype(case.dtype).itemsize), 2.0 * weights)
