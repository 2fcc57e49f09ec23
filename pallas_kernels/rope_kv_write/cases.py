"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.rope_kv_write.types import HeadNorm
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """A step's shape; ``padding`` of its tokens go to page 0. Several terms are in float32.
    ``rotary_size`` of each head's dimensions rotate; None rotates all of them."""

    name: str
    tokens: int = 5
    kv_heads: int = 2
    group: int = 4
    head_size: int = 64
    page_size: int = 16
    rotates: bool = True
    rotary_size: int | None = None
    normalizes: bool = False
    dtype: str = "float32"
    padding: int = 2
    terms: int = 1


CASES = (
    Case("plain"),
    Case("group 1", group=1),
    Case("group 7, head size 96", group=7, head_size=96),
    Case("head size 12", head_size=12),
    Case("head size 128, bfloat16", head_size=128, dtype="bfloat16"),
    Case("no rotation", rotates=False),
    Case("half of a head rotates", rotary_size=32, normalizes=True),
    Case("3/4 of a head rotate", head_size=128, rotary_size=96, dtype="bfloat16"),
    Case("2 of 10 rotate, many tokens", 300, head_size=10, rotary_size=2),
    Case("head norms", normalizes=True),
    Case("head norms, bfloat16", normalizes=True, dtype="bfloat16"),
    Case("many tokens", tokens=300),
    Case("page size 64", page_size=64, kv_heads=1),
    Case("three terms", terms=3, dtype="bfloat16"),
)

CARRIED = {"k_pages": 1, "v_pages": 2}
"""Argument -> the output that may take over its buffer."""


def of_layer(layer: LayerShape, name: str, tokens: int, padding: int) -> Case:
    """A step of ``tokens`` tokens over a model's layer."""
    return Case(
        name,
        tokens,
        kv_heads=layer.kv_heads,
        group=layer.heads // layer.kv_heads,
        head_size=layer.head_size,
        page_size=layer.page_size,
        rotates=layer.rotates,
        rotary_size=layer.rotary_size,
        normalizes=layer.normalizes,
        dtype=layer.dtype,
        padding=padding,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small steps that an implementation must pass before a model with such layers uses it."""
    if layer.latent_size is not None:
        return ()
    return (of_layer(layer, "5 tokens", 5, 2), of_layer(layer, "300 tokens", 300, 2))


LAYERS = {"8B": LLAMA_8B, "1B": LLAMA_1B, "8B, head norms": replace(LLAMA_8B, normalizes=True)}
BENCHMARKS = tuple(
    of_layer(layer, f"{name}, {tokens} tokens", tokens, 0)
    for name, layer in LAYERS.items()
    for tokens in (1, 64, 256, 8192)
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``rope_kv_write``; pages hold garbage that must survive elsewhere."""
    rng = np.random.default_rng(seed)

    real = case.tokens - case.padding
    pages = -(-real // case.page_size) + 3
    places = case.page_size + rng.permutation((pages - 1) * case.page_size)[:real]
    places = np.concatenate([places, np.zeros(case.padding, int)])
    pairs = (case.rotary_size or case.head_size) // 2
    angle = rng.uniform(0, 7, (case.tokens, pairs)).astype(np.float32)
    qkv = (case.terms, case.tokens, case.kv_heads, case.group + 2, case.head_size)
    pool = (pages, case.kv_heads, case.page_size, case.head_size)
    q_scale, k_scale = (normal(rng, (case.head_size,), case.dtype) for _ in range(2))
    return {
        "qkv": normal(rng, qkv, case.dtype if case.terms == 1 else "float32"),
        "cos_sin": (jnp.cos(angle), jnp.sin(angle)) if case.rotates else None,
        "norm": HeadNorm(q_scale, k_scale, 1e-6) if case.normalizes else None,
        "k_pages": normal(rng, pool, case.dtype),
        "v_pages": normal(rng, pool, case.dtype),
        "page": jnp.asarray(places // case.page_size, jnp.int32),
        "slot": jnp.asarray(places % case.page_size, jnp.int32),
        "dtype": jnp.dtype(case.dtype),
    }


def cost(case: Case) -> Cost:
    """Queries, keys and values are read and written once, with their places and angles; a
    rotation takes 3 operations a number, and a norm 4."""
    parts = case.kv_heads * (case.group + 2)
    values = case.tokens * parts * case.head_size
    angles = case.tokens * (case.rotary_size or case.head_size) * 4 if case.rotates else 0
    work = 3 * case.rotates + 4 * case.normalizes
    size = jnp.dtype(case.dtype).itemsize
    read = case.terms * values * (size if case.terms == 1 else 4)
    return Cost(read + values * size + angles + 8 * case.tokens, float(work * values))


def specified(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray | None, ...]:
    """Per output the places that the op promises: all queries, and all pages but the padding's."""
    pages = np.arange(arguments["k_pages"].shape[0]) > 0
    return None, pages, pages


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with NaN in the pages, which the op only writes, and only at ``page, slot``.
    Page 0 is left as it is: nobody minds what padding tokens do to it."""
    pools = ("k_pages", "v_pages")
    return arguments | {name: arguments[name].at[1:].set(jnp.nan) for name in pools}
