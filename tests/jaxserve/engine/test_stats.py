"""Counters are plain numbers."""

from jaxserve.engine.stats import Stats


def test_padding_waste_is_the_share_of_empty_places() -> None:
    assert Stats().padding_waste == 0.0
    assert Stats(scheduled_tokens=3, padded_tokens=4).padding_waste == 0.25


def test_two_engines_count_apart() -> None:
    Stats().finished["stop"] = 1
    assert Stats().finished == {}
