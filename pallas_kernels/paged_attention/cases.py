"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.batch import AttentionBatch, plan, plan_sizes
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, Cost, LayerShape, normal


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

CARRIED = {"q": 0}
"""Argument -> the output that may take over its buffer."""


def of_layer(
    layer: LayerShape, name: str, lanes: tuple[tuple[int, int], ...], padding: int
) -> Case:
    """A batch over a model's layer."""
    return Case(
        name,
        lanes,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_size=layer.head_size,
        page_size=layer.page_size,
        sliding_window=layer.sliding_window,
        dtype=layer.dtype,
        padding=padding,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small batches that an implementation must pass before a model with such layers uses it."""
    return (of_layer(layer, "decode", DECODE, 2), of_layer(layer, "mixed", MIXED, 2))


def _spread(lanes: int, low: int, high: int) -> tuple[tuple[int, int], ...]:
    """Decoding lanes whose lengths are evenly spread on a logarithmic scale."""
    return tuple((1, round(low * (high / low) ** (i / (lanes - 1)))) for i in range(lanes))


BATCHES = {
    "decode 64x2048": ((1, 2048),) * 64,
    "decode 256x1024": ((1, 1024),) * 256,
    "decode 64 of 32..4096": _spread(64, 32, 4096),
    "decode 1x16384": ((1, 16384),),
    "decode 8x32768": ((1, 32768),) * 8,
    "prefill 4x2048": ((2048, 2048),) * 4,
    "prefill 1x8192": ((8192, 8192),),
    "chunk of 512 at 4096 + 32x1024": ((512, 4096), *((1, 1024),) * 32),
}
VARIANTS = {
    "head size 96": replace(LLAMA_8B, head_size=96),
    "head size 256": replace(LLAMA_8B, heads=16, head_size=256),
    "group 1": replace(LLAMA_8B, heads=8),
    "group 16": replace(LLAMA_8B, heads=64, kv_heads=4),
    "page size 32": replace(LLAMA_8B, page_size=32),
    "page size 64": replace(LLAMA_8B, page_size=64),
    "window 512": replace(LLAMA_8B, sliding_window=512),
}
BENCHMARKS = (
    *(of_layer(LLAMA_8B, f"8B {name}", lanes, 0) for name, lanes in BATCHES.items()),
    *(of_layer(LLAMA_1B, f"1B {name}", lanes, 0) for name, lanes in BATCHES.items()),
    *(
        of_layer(layer, f"{name}, {batch}", BATCHES[batch], 0)
        for name, layer in VARIANTS.items()
        for batch in ("decode 64x2048", "prefill 4x2048")
    ),
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

    pool = (pages, case.kv_heads, case.page_size, case.head_size)
    return {
        "q": normal(rng, (tokens, case.heads, case.head_size), case.dtype),
        "k_pages": normal(rng, pool, case.dtype),
        "v_pages": normal(rng, pool, case.dtype),
        "page_table": jnp.asarray(table),
        "batch": batch,
        "scale": case.head_size**-0.5,
        "sliding_window": case.sliding_window,
    }


def cost(case: Case) -> Cost:
    """Every key and value that some query sees is read once, and q and the output once each; two
    matrix products per visible pair of query and key."""
    window = case.sliding_window or max(total for _, total in case.lanes)
    keys = pairs = queries = 0
    for new, total in case.lanes:
        queries += new
        keys += min(total, window + new - 1)
        seen = np.arange(total - new + 1, total + 1)
        pairs += int(np.minimum(seen, window).sum())
    vectors = 2 * queries * case.heads + 2 * keys * case.kv_heads
    size = jnp.dtype(case.dtype).itemsize
    return Cost(vectors * case.head_size * size, 4.0 * pairs * case.heads * case.head_size)


def specified(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray | None, ...]:
    """Per output the places [T] that the op promises: those of the lanes' queries."""
    owned = np.zeros(arguments["q"].shape[0], bool)
    starts = np.asarray(arguments["batch"].query_start)
    for start, (new, _) in zip(starts, case.lanes, strict=False):
        owned[start : start + new] = True
    return (owned,)


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with NaN where nobody may read: pages and slots behind each lane's last token,
    the pages of no lane, the padding's page 0."""
    readable = np.zeros((arguments["k_pages"].shape[0], case.page_size), bool)
    table, rows = (np.asarray(a) for a in (arguments["page_table"], arguments["batch"].row))
    for row, (_, total) in zip(rows, case.lanes, strict=False):
        token = np.arange(total)
        readable[table[row, token // case.page_size], token % case.page_size] = True
    ok = jnp.asarray(readable)[:, None, :, None]
    pools = ("k_pages", "v_pages")
    return arguments | {name: jnp.where(ok, arguments[name], jnp.nan) for name in pools}
