"""Which tokens attend to what in one step, and the host's plan of the work.

A step holds up to L lanes. Lane l has ``query_len`` new tokens, at ``query_start`` in q, which are
the last of its ``kv_len`` tokens. Lanes with one new token are split along their keys into decode
items, so that long and short contexts load the GPU evenly (split-KV, Dao et al. 2023); longer ones
are cut into tiles of queries. The host knows all lengths, so planning costs the device nothing, and
the item counts are fixed per bucket, so shapes never change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np

from pallas_kernels.arithmetic import power_of_two


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionBatch:
    """The ragged batch of one step; every array is int32.

    Attributes:
        row: [L], the lane's row in the page table.
        query_start, query_len: [L], the lane's queries are ``q[start : start + len]``.
        kv_len: [L], the lane's tokens including the new ones; 0 for a padding lane.
        decode_lane, decode_start, decode_end: [D], one item each: a lane with one query, and the
            range of its keys; an unused item has start = end = 0.
        decode_first, decode_count: [L], the items of a lane, 0 of them unless query_len is 1.
        tile_lane, tile_start: [C], one tile of queries each, from query ``tile_start`` of the lane;
            an unused tile starts at its lane's query_len or behind. Those that see the most keys
            come first, unused ones last. C is 0 for decode-only buckets.
        tile_tokens: queries in a tile.
    """

    row: jax.Array
    query_start: jax.Array
    query_len: jax.Array
    kv_len: jax.Array
    decode_lane: jax.Array
    decode_start: jax.Array
    decode_end: jax.Array
    decode_first: jax.Array
    decode_count: jax.Array
    tile_lane: jax.Array
    tile_start: jax.Array
    tile_tokens: int = field(metadata={"static": True})


@dataclass(frozen=True)
class PlanSizes:
    """The fixed array lengths of a bucket's plan.

    Attributes:
        lanes: L.
        decode_items: D, at least L.
        tiles: C.
        tile_tokens: queries in a tile.
        min_chunk: fewest keys that a decode item is worth, in tokens.
    """

    lanes: int
    decode_items: int
    tiles: int
    tile_tokens: int
    min_chunk: int = 128


def plan_sizes(lanes: int, tokens: int, group: int, split: bool) -> PlanSizes:
    """Sizes for a bucket of ``lanes`` lanes and ``tokens`` token places.

    Args:
        lanes, tokens: the bucket; decode-only if they are equal.
        group: the largest number of query heads that share a KV head.
        split: whether to leave room for splitting long contexts (worthwhile on a GPU).
    """
    tile_tokens = max(1, 128 // power_of_two(group))
    # Each lane may end in a partly filled tile.
    tiles = 0 if tokens == lanes else -(-tokens // tile_tokens) + lanes
    return PlanSizes(lanes, lanes + 64 if split else lanes, tiles, tile_tokens)


def plan(query_len: np.ndarray, kv_len: np.ndarray, sizes: PlanSizes) -> dict[str, np.ndarray]:
    """Plans the decode items and tiles of a step, on the host.

    Args:
        query_len, kv_len: int32 [n] of the n <= L lanes in use.
        sizes: the bucket's sizes.

    Returns:
        The ``decode_*`` and ``tile_*`` arrays of an AttentionBatch, padded to ``sizes``.
    """
    keys = kv_len * (query_len == 1)
    chunk = _chunk(keys, sizes)
    counts = -(-keys // chunk)
    lane, first, start = _cut(counts, chunk)
    arrays = {
        "decode_lane": _padded(lane, sizes.decode_items),
        "decode_start": _padded(start, sizes.decode_items),
        "decode_end": _padded(np.minimum(start + chunk, keys[lane]), sizes.decode_items),
        "decode_first": _padded(first, sizes.lanes),
        "decode_count": _padded(counts, sizes.lanes),
    }
    if sizes.tiles:
        tile_counts = -(-query_len // sizes.tile_tokens) * (query_len > 1)
        lane, _, start = _cut(tile_counts, sizes.tile_tokens)
        # Those that see the most keys come first, so that none of them is left over at the end.
        longest = np.argsort((query_len - kv_len)[lane] - start, kind="stable")
        lane, start = lane[longest], start[longest]
    else:
        lane = start = np.zeros(0, np.int32)
    unused_tile = np.iinfo(np.int32).max // 2  # behind every lane's queries
    arrays["tile_lane"] = _padded(lane, sizes.tiles)
    arrays["tile_start"] = _padded(start, sizes.tiles, unused_tile)
    return arrays


def _cut(counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of lanes that are cut into ``counts`` pieces of ``size`` each: every piece's lane,
    every lane's first piece, and every piece's start in its lane."""
    first = counts.cumsum() - counts
    lane = np.arange(len(counts)).repeat(counts)
    return lane, first, (np.arange(len(lane)) - first[lane]) * size


def _chunk(keys: np.ndarray, sizes: PlanSizes) -> int:
    """The smallest multiple of ``min_chunk`` keys per item for which the items suffice."""
    units = -(-keys // sizes.min_chunk)
    total, longest = int(units.sum()), int(units.max(initial=1))
    # Each lane's items are its units / middle, rounded up: at least the quotient, and less than one
    # more. So the sum bounds the search from both sides.
    spare = sizes.decode_items - len(keys)
    low = max(1, -(-total // sizes.decode_items))
    high = max(low, min(longest, -(-total // spare))) if spare > 0 else max(low, longest)
    while low < high:
        middle = (low + high) // 2
        if int((-(-units // middle)).sum()) > sizes.decode_items:
            low = middle + 1
        else:
            high = middle
    return low * sizes.min_chunk


def _padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out
