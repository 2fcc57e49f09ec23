"""A failed step loses nothing: the device state is made anew, and the same tokens come out."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, SamplingParams
from jaxserve.engine.request import FinishReason, Status
from tests.helpers.fake_runner import fake_engine, run_to_end
from tests.helpers.faulty_runner import DeviceFailure, Fault, inject
from tests.jaxserve.engine.test_scheduler import (
    JOBS,
    MAX_LEN,
    WORKLOADS,
    Job,
    assert_idle,
    assert_outputs_as_if_alone,
    engines,
    make,
)

FAILURES: st.SearchStrategy[dict[int, Fault]] = st.dictionaries(
    st.integers(0, 40), st.sampled_from(["dispatch", "collect"]), max_size=8
)
NEVER = 10
"""More failures than are ever put in: with one that was not, the engine gives up."""


def streams(jobs: list[Job], faults: dict[int, Fault], **sizes: Any) -> list[list[int]]:
    """What the readers of some jobs see, token by token; the books are checked at every step."""
    engine, _ = make(**sizes, max_failures=NEVER)
    runner = inject(engine, faults)
    requests = []
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(jobs))}
    step = 0
    last_event = max(job.arrival + (job.abort_after or 0) for job in jobs)
    while step <= last_event or engine.has_unfinished_requests:
        for index, job in enumerate(jobs):
            if job.arrival == step:
                requests.append(engine.add(str(index), job.prompt, job.params, job.salt))
            if job.abort_after is not None and job.arrival + job.abort_after == step:
                engine.abort(str(index))
        for update in engine.step():
            tokens[update.request.request_id].append(update.token_id)
        engine.scheduler.check_integrity()
        step += 1
        assert step < 5_000, "no progress"
    assert_idle(engine)
    assert engine.stats.recoveries == runner.num_failures, "no error but those that were put in"
    requests.sort(key=lambda request: int(request.request_id))
    assert_outputs_as_if_alone(jobs, requests, sizes["windows"])
    assert [request.output_token_ids for request in requests] == list(tokens.values())
    return list(tokens.values())


@settings(max_examples=500)
@given(sizes=engines(), jobs=WORKLOADS, faults=FAILURES)
def test_streams_are_the_same_with_and_without_failures(
    sizes: dict[str, Any], jobs: list[Job], faults: dict[int, Fault]
) -> None:
    """Greedy and seeded, with aborts at any time: each stream is what the request gets alone."""
    streams(jobs, faults, **sizes)


@settings(max_examples=100)
@given(sizes=engines(), job=JOBS, data=st.data())
def test_a_failure_in_any_single_step(sizes: dict[str, Any], job: Job, data: st.DataObject) -> None:
    fault = data.draw(st.sampled_from(["dispatch", "collect"]))
    for step in range(MAX_LEN):
        streams([job, job], {step: fault}, **sizes)


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
@pytest.mark.parametrize("fault", ["dispatch", "collect"])
def test_what_ran_waits_in_its_old_order_with_nothing_pending(fault: Fault, run_ahead: int) -> None:
    engine, _ = fake_engine(run_ahead=run_ahead, max_rows=2, max_failures=2)
    inject(engine, {run_ahead + 2: fault})
    requests = [engine.add(str(i), [i, 1, 2], SamplingParams(max_tokens=9)) for i in range(4)]
    while not engine.stats.recoveries:
        engine.step()
    assert list(engine.scheduler.waiting) == requests
    assert [request.status for request in requests] == [Status.WAITING] * 4
    assert [(request.pages, request.num_pending) for request in requests] == [([], 0)] * 4
    assert requests[0].output_token_ids, "tokens that the host knew are kept"
    allocator = engine.scheduler.allocator
    assert allocator.num_free == allocator.num_usable
    run_to_end(engine)
    assert_idle(engine)


def test_cached_prefixes_are_forgotten_with_the_pages() -> None:
    engine, _ = fake_engine(max_failures=2)
    prompt = list(range(20))
    engine.add("before", prompt, SamplingParams(max_tokens=1))
    run_to_end(engine)
    inject(engine, {0: "collect"})
    engine.add("fails", [1], SamplingParams(max_tokens=1))
    run_to_end(engine)
    after = engine.add("after", prompt, SamplingParams(max_tokens=1))
    run_to_end(engine)
    assert after.num_cached_tokens == 0
    assert engine.stats.recoveries == 1


@pytest.mark.parametrize(("fault", "steps"), [("dispatch", (2, 3, 4)), ("collect", (2, 4, 6))])
def test_the_third_failure_in_a_row_is_raised_and_the_requests_are_kept(
    fault: Fault, steps: tuple[int, ...]
) -> None:
    """One step more is under way when collecting fails."""
    engine, _ = fake_engine(max_failures=3)
    inject(engine, dict.fromkeys(steps, fault))
    request = engine.add("a", [1, 2], SamplingParams(max_tokens=30, temperature=0))
    with pytest.raises(DeviceFailure):
        run_to_end(engine)
    assert engine.stats.recoveries == 2
    assert request.status is Status.WAITING
    run_to_end(engine)
    assert len(request.output_token_ids) == 30


def test_failures_with_tokens_between_them_are_counted_anew() -> None:
    engine, _ = fake_engine(max_failures=3)
    inject(engine, lambda step: "collect" if step % 4 == 3 else None)
    request = engine.add("a", [1], SamplingParams(max_tokens=30))
    run_to_end(engine)
    assert len(request.output_token_ids) == 30
    assert engine.stats.recoveries > 3


def test_steps_that_bring_no_token_do_not_hide_failures() -> None:
    """A prompt whose second chunk always fails must not be begun again for ever."""
    engine, _ = fake_engine(max_step_tokens=4, max_failures=3)
    inject(engine, lambda step: "collect" if step % 3 == 1 else None)
    engine.add("long", [1] * 12, SamplingParams(max_tokens=1))
    with pytest.raises(DeviceFailure):
        run_to_end(engine)


def test_bad_logits_end_the_requests_of_their_step_and_no_others() -> None:
    engine, _ = fake_engine(max_rows=2)
    inject(engine, {3: "nan"})
    requests = [engine.add(str(i), [i], SamplingParams(max_tokens=8)) for i in range(4)]
    run_to_end(engine)
    reasons = [request.finish_reason for request in requests]
    assert reasons == [FinishReason.ERROR] * 2 + [FinishReason.LENGTH] * 2


# --- with a model ---------------------------------------------------------------------------------

PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=3, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=4, max_tokens=24, ignore_eos=True, top_k=20, logprobs=2),
    SamplingParams(
        seed=5, max_tokens=24, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.5
    ),
    SamplingParams(seed=6, max_tokens=24, logit_bias={300: 5.0}, bad_words_token_ids=[[300, 300]]),
    SamplingParams(seed=7, max_tokens=24, allowed_token_ids=[*range(300, 340)], prompt_logprobs=2),
]
PROMPTS = [
    *("Once upon a time", "The", "There was a dog. There was a", "One day, a dog met a dog."),
    *("A", "The dog and the cat went to the park and met a dog and a cat. They went to the park."),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with LLM(
        max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32, enforce_eager=True,
        use_tqdm=False,
    ) as llm:  # fmt: skip
        yield llm


def generate(llm: LLM) -> tuple[Any, ...]:
    """(token ids, streamed text, log-probabilities of the last prompt) of the prompts."""
    shown: dict[str, str] = {}

    def on_text(output: Any, text: str) -> None:
        shown[output.request_id] = shown.get(output.request_id, "") + text

    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, on_text=on_text)
    assert [shown[output.request_id] for output in outputs] == [o.outputs[0].text for o in outputs]
    token_ids = [output.outputs[0].token_ids for output in outputs]
    of_prompt = [[*entry] for entry in outputs[-1].prompt_logprobs[1:]]
    return token_ids, [*shown.values()], of_prompt


@pytest.mark.parametrize("fault", ["dispatch", "collect"])
@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_a_model_goes_on_with_the_same_text(llm: LLM, fault: Fault, step: int) -> None:
    """Penalty counts, sampling settings and page tables come back with the rows."""
    want = generate(llm)
    engine = llm._engine
    assert engine is not None
    runner = engine._runner

    def lose_everything() -> None:
        for array in jax.tree.leaves(llm._runner._state):
            array.delete()

    inject(engine, {step: fault, step + 9: fault}, lose_everything)
    try:
        before = engine.stats.recoveries
        assert generate(llm) == want
        assert engine.stats.recoveries == before + 2
    finally:
        engine._runner = runner


def test_a_model_that_fails_again_and_again_says_so_and_can_be_used_again(llm: LLM) -> None:
    want = generate(llm)
    engine = llm._engine
    assert engine is not None
    runner = engine._runner
    inject(engine, lambda step: "dispatch")
    with pytest.raises(DeviceFailure):
        llm.generate("Once", use_tqdm=False)
    engine._runner = runner
    assert generate(llm) == want
