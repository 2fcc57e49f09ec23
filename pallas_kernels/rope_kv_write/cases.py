"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rope_kv_write.types import HeadNorm


@dataclass(frozen=True)
class Case:
    """A step's shape; ``padding`` of its tokens go to page 0 together."""

    name: str
    tokens: int = 5
    kv_heads: int = 2
    group: int = 4
    head_size: int = 64
    page_size: int = 16
    rotates: bool = True
    normalizes: bool = False
    dtype: str = "float32"
    padding: int = 2


CASES = (
    Case("plain"),
    Case("group 1", group=1),
    Case("group 7, head size 96", group=7, head_size=96),
    Case("head size 12", head_size=12),
    Case("head size 128, bfloat16", head_size=128, dtype="bfloat16"),
    Case("no rotation", rotates=False),
    Case("head norms", normalizes=True),
    Case("head norms, bfloat16", normalizes=True, dtype="bfloat16"),
    Case("many tokens", tokens=300),
    Case("page size 64", page_size=64, kv_heads=1),
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``rope_kv_write``; pages hold garbage that must survive elsewhere."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)

    real = case.tokens - case.padding
    pages = -(-real // case.page_size) + 3
    places = case.page_size + rng.permutation((pages - 1) * case.page_size)[:real]
    places = np.concatenate([places, np.zeros(case.padding, int)])
    angle = rng.uniform(0, 7, (case.tokens, case.head_size // 2)).astype(np.float32)
    pool = (pages, case.kv_heads, case.page_size, case.head_size)
    return {
        "qkv": normal(case.tokens, case.kv_heads, case.group + 2, case.head_size),
        "cos_sin": (jnp.cos(angle), jnp.sin(angle)) if case.rotates else None,
        "norm": HeadNorm(normal(case.head_size), normal(case.head_size), 1e-6)
        if case.normalizes
        else None,
        "k_pages": normal(*pool),
        "v_pages": normal(*pool),
        "page": jnp.asarray(places // case.page_size, jnp.int32),
        "slot": jnp.asarray(places % case.page_size, jnp.int32),
    }
