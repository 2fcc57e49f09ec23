"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.cases import BATCHES, DECODE, MIXED, poisoned, ragged, specified
from pallas_kernels.workload import DEEPSEEK_V2_LITE, DEEPSEEK_V3, Cost, LayerShape, normal

__all__ = ["BENCHMARKS", "CASES", "Case", "cost", "gate_cases", "make", "poison", "specified"]


@dataclass(frozen=True)
class Case:
    """One ragged batch: per lane (new tokens, tokens in all), and the model's shape.

    ``padding`` lanes and tokens come on top, as in a step that doesn't fill its bucket.
    """

    name: str
    lanes: tuple[tuple[int, int], ...]
    heads: int = 16
    size: int = 40
    latent_size: int = 32
    page_size: int = 16
    dtype: str = "float32"
    padding: int = 2


FEW = ((1, 5), (3, 3), (5, 21), (1, 70))
FULL: dict[str, Any] = {"size": 576, "latent_size": 512}

CASES = (
    Case("decode", DECODE),
    Case("decode, 20 heads", DECODE, heads=20),
    Case("decode, 128 heads", DECODE, heads=128),
    Case("decode, latent 20", DECODE, size=26, latent_size=20),
    Case("decode, latent 160", DECODE, size=296, latent_size=160),
    Case("decode, bfloat16", DECODE, dtype="bfloat16"),
    Case("decode, DeepSeek-V2-Lite", DECODE, **FULL),
    Case("decode, DeepSeek-V3", DECODE, heads=128, **FULL, dtype="bfloat16"),
    Case("decode, one long lane", ((1, 1500),), padding=0),
    Case("mixed", MIXED),
    Case("mixed, 3 heads", MIXED, heads=3),
    Case("mixed, 20 heads", MIXED, heads=20),
    Case("mixed, 128 heads", FEW, heads=128),
    Case("mixed, page size 32", MIXED, page_size=32),
    Case("mixed, bfloat16", MIXED, dtype="bfloat16"),
    Case("mixed, DeepSeek-V2-Lite", FEW, **FULL),
    Case("mixed, DeepSeek-V3", FEW, heads=128, **FULL, dtype="bfloat16"),
)


def of_layer(
    layer: LayerShape, name: str, lanes: tuple[tuple[int, int], ...], padding: int
) -> Case:
    """A batch over a model's layer with latent attention."""
    assert layer.latent_size is not None
    return Case(
        name,
        lanes,
        heads=layer.heads,
        size=layer.head_size,
        latent_size=layer.latent_size,
        page_size=layer.page_size,
        dtype=layer.dtype,
        padding=padding,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small batches that an implementation must pass before a model with such layers uses it."""
    if layer.latent_size is None:
        return ()
    return (of_layer(layer, "decode", DECODE, 2), of_layer(layer, "mixed", MIXED, 2))


BENCHMARKS = tuple(
    of_layer(layer, f"{model} {name}", lanes, 0)
    for model, layer in (("V2-Lite", DEEPSEEK_V2_LITE), ("V3", DEEPSEEK_V3))
    for name, lanes in BATCHES.items()
)


def make(case: Case, seed: int, split: bool = True) -> dict[str, Any]:
    """Random arguments of ``latent_attention``; see ``paged_attention``'s."""
    rng = np.random.default_rng(seed)
    table, batch, tokens = ragged(rng, case.lanes, case.padding, case.page_size, case.heads, split)
    return {
        "q": normal(rng, (tokens, case.heads, case.size), case.dtype),
        "pages": normal(rng, (table.size + 1, 1, case.page_size, case.size), case.dtype),
        "page_table": table,
        "batch": batch,
        "scale": case.size**-0.5,
        "latent_size": case.latent_size,
    }


def cost(case: Case) -> Cost:
    """Every key that some query sees is read once, and q and the output once each; two matrix
    products per visible pair of query and key."""
    keys = sum(total for _, total in case.lanes)
    queries = sum(new for new, _ in case.lanes) * case.heads
    pairs = sum((2 * total - new + 1) * new // 2 for new, total in case.lanes) * case.heads
    widths = case.size + case.latent_size
    size = jnp.dtype(case.dtype).itemsize
    return Cost((queries * widths + keys * case.size) * size, 2.0 * pairs * widths)


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with NaN where nobody may read; see ``paged_attention``'s."""
    return arguments | {"pages": poisoned(arguments["pages"], case.lanes, arguments)}
