"""Which layers share page tables and the KV cache's arrays, as data. No JAX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

MAX_TABLES = 8


@dataclass(frozen=True)
class PageGroups:
    """How layers share page tables and the cache's arrays.

    A table's layers see the same tokens, so they want the same pages. All tables have as many
    places for layers, and layers with the same place in different tables share an array of pages:
    a page holds keys and values of one table's layers, whichever table that is.

    Attributes:
        windows: per table, the sliding window of its layers; None if they see everything.
        table, place: per layer.
        num_places: arrays (or pairs of them) that the cache has.
    """

    windows: tuple[int | None, ...]
    table: tuple[int, ...]
    place: tuple[int, ...]
    num_places: int


def group_layers(
    sliding_windows: Sequence[int | None], cached: Sequence[Hashable], max_model_len: int
) -> PageGroups:
    """The grouping that leaves the fewest places empty, with at most MAX_TABLES tables.

    Args:
        sliding_windows: of each layer.
        cached: what the cache keeps of a token in each layer; where layers differ, they can't share
            arrays, and all have one table.
        max_model_len: windows at least that long are none.
    """
    windows = [w if w is not None and w < max_model_len else None for w in sliding_windows]
    if len(set(cached)) > 1:
        widest = None if None in windows else max(w for w in windows if w is not None)
        windows = [widest] * len(windows)
    counts = Counter(windows)

    def tables(places: int) -> int:
        return sum(-(-count // places) for count in counts.values())

    sizes = [n for n in range(1, max(counts.values()) + 1) if tables(n) <= MAX_TABLES]
    places = min(sizes, key=lambda n: (tables(n) * n, -n))
    seen: Counter[int | None] = Counter()
    first, all_windows = {}, list[int | None]()
    for window, count in counts.items():
        first[window] = len(all_windows)
        all_windows += [window] * -(-count // places)
    table, place = [], []
    for window in windows:
        table.append(first[window] + seen[window] // places)
        place.append(seen[window] % places)
        seen[window] += 1
    return PageGroups(tuple(all_windows), tuple(table), tuple(place), places)
