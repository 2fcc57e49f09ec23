"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.batch import (
    AttentionBatch,
    decode_places,
    plan_decode,
    plan_sizes,
    plan_tiles,
)
from pallas_kernels.paged_attention.variant import Variant
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """One ragged batch: per lane (new tokens, tokens in all), and the model's shape.

    ``padding`` lanes and tokens come on top, as in a step that doesn't fill its bucket. The last
    three fields make its Variant; ``plain`` cases have none.
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
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False

    @property
    def plain(self) -> bool:
        return self.softcap is None and not self.alibi and not self.sinks


DECODE = ((1, 1), (1, 17), (1, 200), (1, 333))
MIXED = ((1, 5), (7, 7), (40, 90), (1, 150), (33, 33))

PLAIN_CASES = (
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
VARIANT_CASES = (
    Case("decode, softcap", DECODE, softcap=2.0),
    Case("decode, ALiBi, group 3", DECODE, heads=6, alibi=True),
    Case("decode, sinks", DECODE, sinks=True),
    # 12 items, of which the window leaves the first ones no key.
    Case("decode, long, window, sinks", ((1, 1500),), sliding_window=200, padding=0, sinks=True),
    Case("decode, long, all variants", ((1, 1500),), softcap=2.0, alibi=True, sinks=True),
    Case("mixed, softcap, head size 128", MIXED, head_size=128, softcap=2.0),
    Case("mixed, ALiBi, group 1", MIXED, heads=2, alibi=True),
    Case("mixed, sinks, window", MIXED, sinks=True, sliding_window=20),
    Case("mixed, softcap, ALiBi, sinks", MIXED, softcap=2.0, alibi=True, sinks=True),
)
CASES = PLAIN_CASES + VARIANT_CASES

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
        softcap=layer.softcap,
        alibi=layer.alibi,
        sinks=layer.sinks,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small batches that an implementation must pass before a model with such layers uses it."""
    if layer.latent_size is not None:
        return ()
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
    "softcap": replace(LLAMA_8B, softcap=50.0),
    "ALiBi": replace(LLAMA_8B, alibi=True),
    "sinks, window 128": replace(LLAMA_8B, head_size=64, sinks=True, sliding_window=128),
}
BENCHMARKS = (
    *(of_layer(LLAMA_8B, f"8B {name}", lanes, 0) for name, lanes in BATCHES.items()),
    *(of_layer(LLAMA_1B, f"1B {name}", lanes, 0) for name, lanes in BATCHES.items()),
    *(
        of_layer(layer, f"{name}, {batch}", BATCHES[batch], 0)
        for name, layer in VARIANTS.items()
        for batch in ("decode 64x2048", "decode 8x32768", "prefill 4x2048")
    ),
)


def make(case: Case, seed: int, split: bool = True) -> dict:
    """Random arguments of ``paged_attention`` for a case, with NaN-free garbage in unused pages.

    Lanes stand in shuffled rows, and their pages are scattered over the pool; page 0 is the
    padding's. ``split`` leaves the plan room to split contexts.
    """
    rng = np.random.default_rng(seed)
    group = case.heads // case.kv_heads
    places = decode_places(case.head_size, case.kv_heads, group)
    table, batch, tokens = ragged(
        *(rng, case.lanes, case.padding, case.page_size, group, split),
        places=places,
        window=case.sliding_window,
    )
    pool = (table.size + 1, case.kv_heads, case.page_size, case.head_size)
    return {
        "q": normal(rng, (tokens, case.heads, case.head_size), case.dtype),
        "k_pages": normal(rng, pool, case.dtype),
        "v_pages": normal(rng, pool, case.dtype),
        "page_table": table,
        "batch": batch,
        "scale": case.head_size**-0.5,
        "sliding_window": case.sliding_window,
        **({} if case.plain else {"variant": _variant(case, rng)}),
    }


def _variant(case: Case, rng: np.random.Generator) -> Variant:
    """Slopes of the size that models have, and sinks that weigh about as much as the keys."""
    slopes = jnp.asarray(2.0 ** -rng.uniform(1, 8, case.heads), jnp.float32)
    sinks = normal(rng, (case.heads,), case.dtype) + 4
    return Variant(slopes if case.alibi else None, sinks if case.sinks else None, case.softcap)


def ragged(
    rng: np.random.Generator,
    lanes: tuple[tuple[int, int], ...],
    padding: int,
    page_size: int,
    group: int,
    split: bool = True,
    places: int | None = None,
    window: int | None = None,
) -> tuple[jax.Array, AttentionBatch, int]:
    """A page table without page 0, a batch, and the token places of the step; see ``make``."""
    query_len = np.array([new for new, _ in lanes], np.int32)
    kv_len = np.array([total for _, total in lanes], np.int32)
    count = len(lanes) + padding
    decode_only = bool((query_len == 1).all())
    tokens = count if decode_only else int(query_len.sum()) + padding
    width = -(-int(kv_len.max()) // page_size) + 1
    table = (rng.permutation(count * width) + 1).reshape(count, width).astype(np.int32)
    rows = rng.permutation(count).astype(np.int32)
    sizes = plan_sizes(count, tokens, group, split, places)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, padding)).astype(np.int32)

    arrays = {
        "row": rows,
        "query_start": padded(np.cumsum(query_len) - query_len),
        "query_len": padded(query_len),
        "kv_len": padded(kv_len),
        **plan_decode(query_len, kv_len, sizes, window),
        **plan_tiles(query_len, kv_len, sizes),
    }
    batch = AttentionBatch(
        **{name: jnp.asarray(array) for name, array in arrays.items()},
        tile_tokens=sizes.tile_tokens,
    )
    return jnp.asarray(table), batch, tokens


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
    pages before its window, the pages of no lane, the padding's page 0."""
    pools, window = ("k_pages", "v_pages"), case.sliding_window
    return arguments | {
        name: poisoned(arguments[name], case.lanes, arguments, window) for name in pools
    }


def poisoned(
    pages: jax.Array,
    lanes: tuple[tuple[int, int], ...],
    arguments: dict[str, Any],
    window: int | None = None,
) -> jax.Array:
    """Pages [pages, heads, page_size, size] with NaN where nobody may read."""
    page_size = pages.shape[2]
    readable = np.zeros((pages.shape[0], page_size), bool)
    table, rows = (np.asarray(a) for a in (arguments["page_table"], arguments["batch"].row))
    for row, (new, total) in zip(rows, lanes, strict=False):
        lowest = 0 if window is None else max(total - new - window + 1, 0)
        token = np.arange(lowest // page_size * page_size, total)
        readable[table[row, token // page_size], token % page_size] = True
    return jnp.where(jnp.asarray(readable)[:, None, :, None], pages, jnp.nan)
