"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.batch import AttentionBatch, plan, plan_sizes


@dataclass(frozen=True)
class Case:
    """One ragged batch: per lane (new tokens, tokens in all), and the model's shape.

    ``padding`` lanes and tokens come on top, as in a step that doesn't fill its bucket.
    """

    name: str
    lanes: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    sliding_window: int | None = None
    dtype: str = "float32"
    padding: int = 2


DECODE = ((1, 1), (1, 17), (1, 200), (1, 333))
MIXED = ((1, 5), (7, 7), (40, 90), (1, 150), (33, 33))

CASES = (
    Case("decode", DECODE),
    Case("decode, group 1", DECODE, heads=3, kv_heads=3),
    Case("decode, group 7", DECODE, heads=7, kv_heads=1, head_size=128),
    Case("decode, group 16", DECODE, heads=16, kv_heads=1),
    Case("decode, head size 8", DECODE, head_size=8),
    Case("decode, head size 96", DECODE, head_size=96),
    Case("decode, head size 256", DECODE, head_size=256),
    Case("decode, page size 64", DECODE, page_size=64),
    Case("decode, window", DECODE, sliding_window=50),
    Case("decode, bfloat16", DECODE, dtype="bfloat16"),
    Case("decode, one long lane", ((1, 1500),), padding=0),
    Case("mixed", MIXED),
    Case("mixed, group 1", MIXED, heads=2, kv_heads=2),
    Case("mixed, group 3", MIXED, heads=6, kv_heads=2, head_size=32),
    Case("mixed, head size 12", MIXED, head_size=12),
    Case("mixed, head size 96", MIXED, head_size=96),
    Case("mixed, head size 128", MIXED, head_size=128),
    Case("mixed, window", MIXED, sliding_window=20),
    Case("mixed, page size 32", MIXED, page_size=32),
    Case("mixed, bfloat16", MIXED, dtype="bfloat16"),
)


def make(case: Case, seed: int, split: bool = True) -> dict:
    """Random arguments of ``paged_attention`` for a case, with NaN-free garbage in unused pages.

    Lanes stand in shuffled rows, and their pages are scattered over the pool; page 0 is the
    padding's. ``split`` leaves the plan room to split contexts.
    """
    rng = np.random.default_rng(seed)
    query_len = np.array([new for new, _ in case.lanes], np.int32)
    kv_len = np.array([total for _, total in case.lanes], np.int32)
    lanes = len(case.lanes) + case.padding
    decode_only = bool((query_len == 1).all())
    tokens = lanes if decode_only else int(query_len.sum()) + case.padding
    width = -(-int(kv_len.max()) // case.page_size) + 1
    pages = lanes * width + 1
    table = (rng.permutation(pages - 1) + 1).reshape(lanes, width).astype(np.int32)
    rows = rng.permutation(lanes).astype(np.int32)
    sizes = plan_sizes(lanes, tokens, case.heads // case.kv_heads, split)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, case.padding)).astype(np.int32)

    arrays = {
        "row": rows,
        "query_start": padded(np.cumsum(query_len) - query_len),
        "query_len": padded(query_len),
        "kv_len": padded(kv_len),
        **plan(query_len, kv_len, sizes),
    }
    batch = AttentionBatch(
        **{name: jnp.asarray(array) for name, array in arrays.items()},
        tile_tokens=sizes.tile_tokens,
    )

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)

    pool = (pages, case.kv_heads, case.page_size, case.head_size)
    return {
        "q": normal(tokens, case.heads, case.head_size),
        "k_pages": normal(*pool),
        "v_pages": normal(*pool),
        "page_table": jnp.asarray(table),
        "batch": batch,
        "scale": case.head_size**-0.5,
        "sliding_window": case.sliding_window,
    }
