"""The engine's front door: what it refuses, and what it frees."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.engine.core import Engine
from jaxserve.engine.page_allocator import PageAllocator
from jaxserve.engine.request import FinishReason, Status
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.errors import ConfigError, EngineClosedError, InvalidRequestError
from jaxserve.sampling.params import SamplingParams
from tests.helpers.fake_runner import FakeRunner, fake_engine, naive, run_to_end

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.mark.parametrize(
    "prompt",
    [[], [1] * 20, [1] * 21, [100], [-1], [1, 2**40], [True], [1.0], ["1"], [None]],
    ids=str,
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt: list[Any]) -> None:
    engine, _ = fake_engine(max_model_len=20, vocab_size=100)
    with pytest.raises(InvalidRequestError) as error:
        engine.add("a", prompt, GREEDY)
    assert error.value.param == "prompt"
    assert not engine.has_unfinished_requests


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    engine, _ = fake_engine(max_model_len=20)
    request = engine.add("a", [99] * 19, SamplingParams(max_tokens=None))
    run_to_end(engine)
    assert len(request.output_token_ids) == 1
    assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("asked", "given"), [(3, 3), (17, 17), (18, 17), (None, 17)])
def test_max_tokens_ends_with_the_context(asked: int | None, given: int) -> None:
    engine, _ = fake_engine(max_model_len=20)
    request = engine.add("a", [1, 2, 3], SamplingParams(max_tokens=asked))
    run_to_end(engine)
    assert len(request.output_token_ids) == given


def test_stop_ids_outside_the_vocabulary_are_refused() -> None:
    engine, _ = fake_engine(vocab_size=100)
    with pytest.raises(InvalidRequestError) as error:
        engine.add("a", [1], SamplingParams(stop_token_ids=[100]))
    assert error.value.param == "stop_token_ids"


def test_an_id_is_refused_while_it_is_in_use() -> None:
    engine, _ = fake_engine()
    engine.add("a", [1], GREEDY)
    with pytest.raises(InvalidRequestError) as error:
        engine.add("a", [2], GREEDY)
    assert error.value.param == "request_id"
    run_to_end(engine)
    engine.add("a", [2], GREEDY)


def test_the_prompt_is_copied() -> None:
    engine, _ = fake_engine()
    prompt = [1, 2, 3]
    request = engine.add("a", prompt, GREEDY)
    prompt.clear()
    run_to_end(engine)
    assert request.token_ids == [1, 2, 3, *naive([1, 2, 3], 4, 100)]


def test_the_models_end_tokens_stop_unless_ignored() -> None:
    end = naive([1, 2], 3, 100)[2]
    engine, _ = fake_engine(eos_token_ids=[end])
    ends = engine.add("ends", [1, 2], SamplingParams(temperature=0))
    goes_on = engine.add("goes on", [1, 2], SamplingParams(temperature=0, ignore_eos=True))
    run_to_end(engine)
    assert (len(ends.output_token_ids), ends.stop_reason) == (3, end)
    assert (len(goes_on.output_token_ids), goes_on.stop_reason) == (16, None)


def test_a_stop_id_before_min_tokens_does_not_stop() -> None:
    stop = naive([1, 2], 2, 100)[1]
    engine, _ = fake_engine()
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[stop], min_tokens=3)
    request = engine.add("a", [1, 2], params)
    run_to_end(engine)
    assert request.output_token_ids == naive([1, 2], 6, 100, None, [stop], 3)
    assert len(request.output_token_ids) >= 3


def outputs_without_seeds(engine_seed: int) -> list[list[int]]:
    engine, _ = fake_engine(seed=engine_seed)
    requests = [engine.add(str(index), [1], SamplingParams()) for index in range(3)]
    run_to_end(engine)
    return [request.output_token_ids for request in requests]


def test_without_a_seed_equal_prompts_differ_but_a_new_engine_repeats_them() -> None:
    outputs = outputs_without_seeds(0)
    assert len({tuple(output) for output in outputs}) == 3
    assert outputs == outputs_without_seeds(0)
    assert outputs != outputs_without_seeds(1)


def test_the_seeds_that_the_engine_chooses_are_the_same_in_every_process() -> None:
    engine, _ = fake_engine(seed=0)
    assert engine.add("a", [1], SamplingParams()).seed == 3153696582655363665


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5, -(2**63)])
def test_a_given_seed_is_kept_as_64_bits(seed: int) -> None:
    engine, _ = fake_engine()
    request = engine.add("a", [1], SamplingParams(seed=seed))
    assert request.seed == seed % 2**64


def salt_of(prompt_len: int, salt: str = "", dynamic_rope_len: int | None = None) -> bytes:
    allocator = PageAllocator(64, 4, enable_prefix_caching=True)
    scheduler = Scheduler(allocator, max_rows=4, max_step_tokens=16, stats=Stats())
    runner = FakeRunner(64, 4, 4, 100)
    limits = {"max_model_len": 100, "vocab_size": 100, "dynamic_rope_len": dynamic_rope_len}
    return Engine(scheduler, runner, **limits).add("a", [1] * prompt_len, GREEDY, salt).cache_salt


def test_no_salt_can_be_made_to_equal_another() -> None:
    salts = ["", "a", "\0", "\x0030", "('', 30)", "\ud800", "b" * 16]
    assert len({salt_of(5, salt) for salt in salts}) == len(salts)
    assert {len(salt_of(5, salt)) for salt in salts} == {16}


def test_prompts_whose_keys_depend_on_their_length_share_only_with_that_length() -> None:
    assert salt_of(10) == salt_of(30)
    assert salt_of(10, dynamic_rope_len=20) == salt_of(20, dynamic_rope_len=20)
    long = {salt_of(length, dynamic_rope_len=20) for length in (10, 21, 22)}
    assert len(long) == 3
    assert salt_of(10, "\x0030", dynamic_rope_len=20) != salt_of(30, dynamic_rope_len=20)


def test_an_engine_whose_pages_cannot_hold_one_sequence_is_refused() -> None:
    fake_engine(num_pages=6, page_size=4, max_model_len=20)
    with pytest.raises(ConfigError, match="max_model_len=21 needs 6 KV pages"):
        fake_engine(num_pages=6, page_size=4, max_model_len=21)


def test_a_step_without_requests_does_nothing() -> None:
    engine, _ = fake_engine()
    assert not engine.has_unfinished_requests
    assert engine.step() == []


def test_close_aborts_everything_and_frees_the_device() -> None:
    engine, runner = fake_engine(max_rows=2)
    requests = [engine.add(str(index), [index], GREEDY) for index in range(4)]
    engine.step()
    engine.close()
    assert runner.closed
    assert {request.status for request in requests} == {Status.FINISHED}
    assert {request.finish_reason for request in requests} == {FinishReason.ABORT}
    assert not engine.has_unfinished_requests
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_usable
    engine.close()


def test_a_closed_engine_refuses_work() -> None:
    engine, _ = fake_engine()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.add("a", [1], GREEDY)
    with pytest.raises(EngineClosedError):
        engine.step()
    engine.abort("a")
