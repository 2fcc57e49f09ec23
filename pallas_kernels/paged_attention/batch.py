"""Which tokens attend to what in one step, and the host's plan of the work.

A step holds up to L lanes. Lane l has ``query_len`` new tokens, at ``query_start`` in q, which are
the last of its ``kv_len`` tokens. Lanes with one new token are split along their keys into decode
items, so that long and short contexts load the GPU evenly (split-KV, Dao et al. 2023); longer ones
are cut into tiles of queries. The host knows all lengths, so planning costs the device nothing, and
the item counts are fixed per bucket, so shapes never change.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np

from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import multiprocessors

NOTHING = np.zeros(0, np.int32)
UNUSED_TILE = np.iinfo(np.int32).max // 2
"""Where a tile starts that stands behind every lane's queries."""
MERGE = 64
"""Keys that an item could read while the results of a lane's items are added up."""
BUSY = 0.75
"""Share of the places that suffices for the memory's bandwidth."""


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

    PLANNED: ClassVar = tuple(f"decode_{n}" for n in ("lane", "start", "end", "first", "count"))
    """The arrays that ``plan_decode`` makes."""

    def of_plan(self, number: int) -> AttentionBatch:
        """One of several batches that differ in their decode items only: here each ``decode_*``
        array has one more axis, in front."""
        own = {name: getattr(self, name)[number] for name in self.PLANNED}
        return dataclasses.replace(self, **own)


@dataclass(frozen=True)
class PlanSizes:
    """The fixed array lengths of a bucket's plan.

    Attributes:
        lanes: L.
        decode_items: D, at least L.
        tiles: C.
        tile_tokens: queries in a tile.
        places: decode items that run at the same time; None if that is not known.
        min_chunk: fewest keys that a decode item is worth, in tokens.
    """

    lanes: int
    decode_items: int
    tiles: int
    tile_tokens: int
    places: int | None = None
    min_chunk: int = 128


def decode_places(head_size: int, kv_heads: int, group: int) -> int | None:
    """Decode items that run at the same time on the GPU that code is traced for; None if it is
    traced for something else. The Triton kernel's programs per multiprocessor are those of an H200,
    found by where a few items more cost a second round."""
    cores = multiprocessors()
    if cores is None:
        return None
    programs = 8 if head_size <= 64 else 4
    if head_size > 128 and group >= 16:
        programs = 3
    return max(1, cores * programs // kv_heads)


def plan_sizes(
    lanes: int, tokens: int, group: int, split: bool, places: int | None = None
) -> PlanSizes:
    """Sizes for a bucket of ``lanes`` lanes and ``tokens`` token places.

    Args:
        lanes, tokens: the bucket; decode-only if they are equal.
        group: the largest number of query heads that share a KV head.
        split: whether to leave room for splitting long contexts (worthwhile on a GPU).
        places: see PlanSizes.
    """
    tile_tokens = max(1, 128 // power_of_two(group))
    # Each lane may end in a partly filled tile.
    tiles = 0 if tokens == lanes else -(-tokens // tile_tokens) + lanes
    items = lanes
    if split:
        items += max(64, min(256, (places or 0) - lanes))
    return PlanSizes(lanes, items, tiles, tile_tokens, places)


def plan_decode(
    query_len: np.ndarray, kv_len: np.ndarray, sizes: PlanSizes, window: int | None = None
) -> dict[str, np.ndarray]:
    """Plans the decode items of a step, on the host.

    Args:
        query_len, kv_len: int32 [n] of the n <= L lanes in use.
        sizes: the bucket's sizes.
        window: the layers see a lane's last ``window`` tokens only.

    Returns:
        The ``decode_*`` arrays of an AttentionBatch, padded to ``sizes``.
    """
    keys = kv_len * (query_len == 1)
    if window is not None:
        keys = np.minimum(keys, window)
    chunk = _chunk(keys, sizes)
    counts = -(-keys // chunk)
    lane, first, start = _cut(counts, chunk)
    start += (kv_len - keys)[lane]
    return {
        "decode_lane": _padded(lane, sizes.decode_items),
        "decode_start": _padded(start, sizes.decode_items),
        "decode_end": _padded(np.minimum(start + chunk, kv_len[lane]), sizes.decode_items),
        "decode_first": _padded(first, sizes.lanes),
        "decode_count": _padded(counts, sizes.lanes),
    }


def plan_tiles(
    query_len: np.ndarray, kv_len: np.ndarray, sizes: PlanSizes
) -> dict[str, np.ndarray]:
    """The ``tile_*`` arrays of a step; see ``plan_decode``."""
    if not sizes.tiles:
        return {"tile_lane": NOTHING, "tile_start": NOTHING}
    tile_counts = -(-query_len // sizes.tile_tokens) * (query_len > 1)
    lane, _, start = _cut(tile_counts, sizes.tile_tokens)
    # Those that see the most keys come first, so that none of them is left over at the end.
    longest = np.argsort((query_len - kv_len)[lane] - start, kind="stable")
    return {
        "tile_lane": _padded(lane[longest], sizes.tiles),
        "tile_start": _padded(start[longest], sizes.tiles, UNUSED_TILE),
    }


def _cut(counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of lanes that are cut into ``counts`` pieces of ``size`` each: every piece's lane,
    every lane's first piece, and every piece's start in its lane."""
    first = counts.cumsum() - counts
    lane = np.arange(len(counts)).repeat(counts)
    return lane, first, (np.arange(len(lane)) - first[lane]) * size


def _chunk(keys: np.ndarray, sizes: PlanSizes) -> int:
    """Keys per item: of a few candidates, the one that is expected to be done first."""
    places, unit = sizes.places, sizes.min_chunk
    units = -(-keys // unit)
    finest = _smallest_chunk(units, sizes.decode_items) * unit
    lanes = int(np.count_nonzero(keys))
    if places is None or not lanes:
        return finest
    candidates = {int(keys.max()), finest}
    if lanes < places < sizes.decode_items:
        candidates.add(_smallest_chunk(units, places) * unit)
    total = int(keys.sum())

    def duration(chunk: int) -> float:
        """In keys of an item, when as many items run as there are places."""
        items = int((-(-keys // chunk)).sum())
        # Items that find no place at first run later, in the end almost alone.
        longest = chunk if items <= places else total / places + 0.75 * chunk
        return max(total / (BUSY * places), longest) + MERGE * (items > lanes)

    return min(sorted(candidates, reverse=True), key=duration)


def _smallest_chunk(units: np.ndarray, items: int) -> int:
    """The fewest units per item for which ``items`` items suffice."""
    total, longest = int(units.sum()), int(units.max(initial=1))
    # Each lane's items are its units / middle, rounded up: at least the quotient, and less than one
    # more. So the sum bounds the search from both sides.
    spare = items - len(units)
    low = max(1, -(-total // items))
    high = max(low, min(longest, -(-total // spare))) if spare > 0 else max(low, longest)
    while low < high:
        middle = (low + high) // 2
        if int((-(-units // middle)).sum()) > items:
            low = middle + 1
        else:
            high = middle
    return low


def _padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, np.int32) if fill else np.zeros(size, np.int32)
    out[: len(values)] = values
    return out
