"""Counters are plain numbers."""

from jaxserve.engine.stats import Stats
from jaxserve.sampling.params import SamplingParams
from tests.helpers.fake_runner import fake_engine, run_to_end


def test_padding_waste_is_the_share_of_empty_places() -> None:
    assert Stats().padding_waste == 0.0
    assert Stats(scheduled_tokens=3, padded_tokens=4).padding_waste == 0.25


def test_two_engines_count_apart() -> None:
    Stats().finished["stop"] = 1
    assert Stats().finished == {}


def test_kv_waste_is_the_share_of_slots_without_a_token() -> None:
    assert Stats().kv_waste == 0
    assert Stats(kv_slots=64, kv_tokens=48).kv_waste == 0.25


def test_slots_and_their_tokens_are_counted_each_step() -> None:
    engine, _ = fake_engine(page_size=4)
    engine.add("a", [1] * 6, SamplingParams(max_tokens=4))
    run_to_end(engine)
    assert engine.stats.kv_tokens == 6 + 7 + 8 + 9
    assert engine.stats.kv_slots == 8 + 8 + 8 + 12
