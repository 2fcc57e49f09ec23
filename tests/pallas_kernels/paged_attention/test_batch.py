"""The host's plan of decode items: every key once, within the places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_attention import PlanSizes, decode_places, plan_decode, plan_sizes

LANES = st.lists(st.tuples(st.sampled_from([1, 1, 1, 5]), st.integers(5, 50_000)), max_size=12)


def items_of(arrays: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """(lane, start, end) of the items in use."""
    names = ("decode_lane", "decode_start", "decode_end")
    items = zip(*(arrays[name].tolist() for name in names), strict=True)
    return [item for item in items if item[2] > item[1]]


def planned(kv_len: list[int], sizes: PlanSizes) -> list[tuple[int, int, int]]:
    lengths = np.array(kv_len, np.int32)
    return items_of(plan_decode(np.ones_like(lengths), lengths, sizes))


@given(LANES, st.sampled_from([None, 1, 100, 4096]), st.sampled_from([None, 1, 7, 66]))
def test_items_cover_what_each_decoding_lane_sees_once(lanes, window, places) -> None:
    query_len, kv_len = np.array(lanes, np.int32).reshape(-1, 2).T
    sizes = plan_sizes(12, 12, 4, split=True, places=places)
    arrays = plan_decode(query_len, kv_len, sizes, window)
    items = items_of(arrays)
    for lane, (new, total) in enumerate(lanes):
        first, count = (arrays[f"decode_{n}"][lane] for n in ("first", "count"))
        own = items[first : first + count]
        assert all(item[0] == lane for item in own)
        seen = min(total, window or total) if new == 1 else 0
        assert [key for _, start, end in own for key in (start, end)][1:-1:2] == [
            start for _, start, _ in own[1:]
        ]
        assert bool(own) == (seen > 0)
        if own:
            assert (own[0][1], own[-1][2]) == (total - seen, total)
    assert len(items) == arrays["decode_count"].sum()


@pytest.mark.parametrize(
    ("places", "count"), [(None, 72), (66, 64), (33, 32), (49, 48), (528, 256)]
)
def test_equal_lanes_fill_the_places_once(places: int | None, count: int) -> None:
    sizes = plan_sizes(8, 8, 4, split=True, places=places)
    assert len(planned([32768] * 8, sizes)) == count


def test_more_lanes_than_places_are_not_cut_for_the_sake_of_it() -> None:
    sizes = plan_sizes(64, 64, 4, split=True, places=66)
    assert len(planned([2048] * 64, sizes)) == 64


def test_short_lanes_are_cut_only_where_few_are_running() -> None:
    sizes = plan_sizes(64, 64, 4, split=True, places=132)
    assert len(planned([300] * 64, sizes)) == 64
    assert len(planned([300], sizes)) == 3


def test_one_long_lane_among_short_ones_is_cut_beyond_the_places() -> None:
    sizes = plan_sizes(64, 64, 4, split=True, places=66)
    items = planned([32768] + [200] * 63, sizes)
    assert len(items) > 100
    assert max(end - start for _, start, end in items) <= 1024


def test_nothing_is_known_of_places_where_nothing_runs_on_a_gpu() -> None:
    assert decode_places(128, 8, 4) is None
