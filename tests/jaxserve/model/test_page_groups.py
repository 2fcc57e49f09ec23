"""Layers that see the same tokens share a page table; layers in the same place share an array."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.model.page_groups import MAX_TABLES, group_layers

LENGTH = 1000
WINDOWS = st.lists(st.sampled_from([None, 16, 128, LENGTH]), min_size=1, max_size=70)


@given(windows=WINDOWS)
def test_every_layer_has_a_place_of_its_own_in_a_table_with_its_window(
    windows: list[int | None],
) -> None:
    groups = group_layers(windows, ["alike"] * len(windows), LENGTH)
    assert len(set(zip(groups.table, groups.place))) == len(windows)
    assert max(groups.place) < groups.num_places
    assert len(groups.windows) <= MAX_TABLES
    for window, table in zip(windows, groups.table, strict=True):
        assert groups.windows[table] == (None if window == LENGTH else window)


@given(windows=WINDOWS)
def test_layers_that_cache_something_else_share_one_table(windows: list[int | None]) -> None:
    """It keeps what the layer with the widest view sees."""
    windows = [*windows, 16]
    groups = group_layers(windows, list(range(len(windows))), LENGTH)
    seen = [None if window == LENGTH else window for window in windows]
    assert groups.windows == (None if None in seen else max(seen),)
    assert groups.place == tuple(range(len(windows)))


def test_few_places_stay_empty() -> None:
    """Gemma 3 27B: every sixth of 62 layers sees everything."""
    windows = [None if index % 6 == 5 else 1024 for index in range(62)]
    groups = group_layers(windows, ["alike"] * 62, 131072)
    assert (groups.windows, groups.num_places) == ((1024,) * 4 + (None,), 13)
