"""Stop strings: however the text is cut, the result is that of a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.stop import StopStrings

LETTERS = "ab"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)
PIECES = st.lists(st.text(LETTERS, max_size=4), max_size=8)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first (of several, the longest)."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500)
@given(pieces=PIECES, stops=STOPS, include=st.booleans())
def test_any_split_of_a_text_gives_what_a_naive_search_finds(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    watcher = StopStrings(stops, include)
    shown = "".join([watcher.feed(piece) for piece in pieces] + [watcher.flush()])
    assert (shown, watcher.matched) == naive("".join(pieces), stops, include)


@settings(max_examples=500)
@given(pieces=PIECES, stops=STOPS, include=st.booleans())
def test_what_is_held_back_is_just_what_may_begin_a_stop_string(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    watcher = StopStrings(stops, include)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += watcher.feed(piece)
        if watcher.matched is not None:
            break
        beginnings = {stop[:size] for stop in stops for size in range(1, len(stop))}
        held = max((b for b in beginnings if text.endswith(b)), key=len, default="")
        assert shown + held == text


@pytest.mark.parametrize(("include", "shown"), [(False, "Hi "), (True, "Hi </end>")])
def test_the_stop_string_is_kept_only_on_request(include: bool, shown: str) -> None:
    watcher = StopStrings(["</end>"], include)
    assert "".join(watcher.feed(letter) for letter in "Hi </end> more") == shown
    assert watcher.matched == "</end>"


def test_after_a_stop_all_text_is_dropped() -> None:
    watcher = StopStrings(["x"])
    assert watcher.feed("axb") == "a"
    assert watcher.feed("more") == ""
    assert watcher.flush() == ""


def test_a_beginning_that_is_not_completed_is_shown_later() -> None:
    watcher = StopStrings(["stop"])
    assert watcher.feed("a sto") == "a "
    assert watcher.feed("ne") == "stone"


def test_flush_gives_the_held_text_once() -> None:
    watcher = StopStrings(["stop"])
    assert watcher.feed("st") == ""
    assert watcher.flush() == "st"
    assert watcher.flush() == ""
    assert watcher.matched is None


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).feed("anything") == "anything"
