"""Which part of the tokens a step takes so that few places stay empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.step_size import best_fill, num_empty

SIZES = (512, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize(
    ("num_lanes", "num_tokens", "taken"),
    [
        (250, 250, 250),  # decoding only
        (250, 400, 400),  # nothing smaller than 512 to fill
        (250, 512, 512),
        (250, 650, 512),  # 374 places empty, or 0 now and 124 in the next step
        (250, 900, 900),  # 124 empty, or 0 now and 386 in the next step
        (0, 700, 700),  # alone: two steps of 512 places are no better than one of 1024
        (0, 1500, 1024),  # 548 empty, or 36 in the next step
        (0, 8192, 8192),
    ],
)
def test_a_size_is_filled_if_that_leaves_fewer_places_empty(
    num_lanes: int, num_tokens: int, taken: int
) -> None:
    assert best_fill(SIZES, num_lanes, num_tokens) == taken


def test_without_sizes_everything_is_taken() -> None:
    assert best_fill((), 3, 700) == 700
    assert num_empty((), 700) == 0


@given(
    sizes=st.lists(st.integers(1, 100), max_size=5, unique=True).map(sorted),
    num_lanes=st.integers(0, 40),
    num_prompt=st.integers(0, 150),
)
def test_those_that_decode_get_their_token_and_prompts_go_on(
    sizes: list[int], num_lanes: int, num_prompt: int
) -> None:
    num_tokens = num_lanes + num_prompt
    taken = best_fill(sizes, num_lanes, num_tokens)
    assert taken <= num_tokens
    assert taken > num_lanes or num_prompt == 0
    assert taken in (num_tokens, *sizes)
    # Alone, a prompt never costs more places than in one piece.
    if num_lanes == 0 and taken < num_tokens:
        places = [num + num_empty(sizes, num) for num in (taken, num_tokens - taken, num_tokens)]
        assert places[0] + places[1] < places[2]
