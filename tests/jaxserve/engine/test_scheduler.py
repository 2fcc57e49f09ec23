"""Whatever the scheduler does, each request gets the tokens it would get if it were alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.engine.core import Engine
from jaxserve.engine.decision import StepResult
from jaxserve.engine.page_allocator import PageAllocator
from jaxserve.engine.page_tables import held, most_pages
from jaxserve.engine.request import FinishReason, Request, RequestUpdate, Status
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.sampling.params import SamplingParams
from tests.helpers.fake_runner import FakeRunner, fake_engine, naive, run_to_end

VOCAB = 30
MAX_LEN = 24


@dataclass(frozen=True)
class Job:
    """One request of a made-up workload; times are steps."""

    prompt: tuple[int, ...]
    max_tokens: int = 8
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    salt: str = ""
    arrival: int = 0
    abort_after: int | None = None

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0.0 if self.seed is None else 1.0,
            seed=self.seed,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            min_tokens=min(self.min_tokens, self.max_tokens),
        )

    def oracle(self, windows: Sequence[int | None]) -> list[int]:
        length = min(self.max_tokens, MAX_LEN - len(self.prompt))
        seed, stops = self.seed, self.stop_token_ids
        return naive(self.prompt, length, VOCAB, seed, stops, self.params.min_tokens, windows)


JOBS = st.builds(
    Job,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple),
    max_tokens=st.integers(1, 10),
    seed=st.none() | st.integers(0, 3),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    min_tokens=st.integers(0, 4),
    salt=st.sampled_from(["", "tenant"]),
    arrival=st.integers(0, 12),
    abort_after=st.none() | st.none() | st.integers(0, 12),
)
WINDOWS = st.just((None,)) | st.lists(st.none() | st.integers(2, 12), min_size=1, max_size=3).map(
    tuple
)
WORKLOADS = st.lists(JOBS, min_size=1, max_size=8)


@st.composite
def engines(draw: st.DrawFn, caching: bool | None = None) -> dict[str, Any]:
    """Sizes of an engine whose pool holds one full sequence and little more."""
    page_size, step_tokens = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    windows = draw(WINDOWS)
    run_ahead = draw(st.integers(1, 3))
    one = most_pages(windows, MAX_LEN, page_size, (run_ahead + 1) * step_tokens)
    return {
        "page_size": page_size,
        "num_pages": 1 + one + draw(st.integers(0, 6)),
        "max_rows": draw(st.integers(1, 5)),
        "max_step_tokens": step_tokens,
        "windows": windows,
        "step_sizes": sorted(draw(st.sets(st.integers(1, 30), max_size=4))),
        "run_ahead": run_ahead,
        "enable_prefix_caching": draw(st.booleans()) if caching is None else caching,
    }


def make(**sizes: Any) -> tuple[Engine, FakeRunner]:
    """An engine for sequences of MAX_LEN tokens."""
    return fake_engine(**{"vocab_size": VOCAB, "max_model_len": MAX_LEN, **sizes})


def assert_idle(engine: Engine) -> None:
    """Every page and every row came back."""
    scheduler = engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.requests
    assert not scheduler.running.requests
    assert not scheduler.waiting
    assert scheduler.allocator.num_free == scheduler.allocator.num_usable


def assert_first_come_first_served(engine: Engine) -> None:
    """In order of arrival, those that run come before those that wait."""
    in_order = [*engine.scheduler.running.requests, *engine.scheduler.waiting]
    assert in_order == list(engine.scheduler.requests.values())


def serve(engine: Engine, jobs: list[Job], extra_steps: int | None = None) -> list[Request]:
    """Lets a workload play, checking the books and the pace after every step.

    Where requests begin anew, they do so out of turn; then ``extra_steps`` says how many steps more
    each may take.
    """
    requests: dict[int, Request] = {}
    order = sorted(range(len(jobs)), key=lambda index: jobs[index].arrival)
    last_event = max(job.arrival + (job.abort_after or 0) for job in jobs)
    limit = last_event + sum(len(job.prompt) + job.max_tokens + 3 for job in jobs) + 2
    limit += len(jobs) * (extra_steps or 0)
    step = 0
    while step <= last_event or engine.has_unfinished_requests:
        for index in order:
            job = jobs[index]
            if job.arrival == step:
                requests[index] = engine.add(str(index), job.prompt, job.params, job.salt)
        for index, job in enumerate(jobs):
            if job.abort_after is not None and job.arrival + job.abort_after == step:
                engine.abort(str(index))
        engine.step()
        engine.scheduler.check_integrity()
        if extra_steps is None:
            assert_first_come_first_served(engine)
        step += 1
        assert step <= limit, "no progress"
    assert_idle(engine)
    return [requests[index] for index in range(len(jobs))]


def assert_outputs_as_if_alone(
    jobs: list[Job], requests: list[Request], windows: Sequence[int | None] = (None,)
) -> None:
    for job, request in zip(jobs, requests, strict=True):
        output = request.output_token_ids
        assert request.status is Status.FINISHED
        if request.finish_reason is FinishReason.ABORT:
            assert job.abort_after is not None
            assert output == job.oracle(windows)[: len(output)]
            continue
        assert output == job.oracle(windows)
        stopped = output[-1] in job.stop_token_ids and len(output) >= job.params.min_tokens
        assert request.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert request.stop_reason == (output[-1] if stopped else None)


# --- properties -------------------------------------------------------------------------------


@settings(max_examples=1000)
@given(sizes=engines(), jobs=WORKLOADS)
def test_every_request_gets_its_tokens_as_if_it_were_alone(
    sizes: dict[str, Any], jobs: list[Job]
) -> None:
    engine, _ = make(**sizes)
    assert_outputs_as_if_alone(jobs, serve(engine, jobs), sizes["windows"])


@settings(max_examples=300)
@given(sizes=engines(), jobs=WORKLOADS, limit=st.integers(1, MAX_LEN))
def test_requests_that_outgrow_the_original_length_begin_anew(
    sizes: dict[str, Any], jobs: list[Job], limit: int
) -> None:
    """The runner checks that no request reads keys of both rotations, its own or cached ones."""
    engine, _ = make(**sizes, long_rope_len=limit)
    requests = serve(engine, jobs, extra_steps=MAX_LEN)
    assert_outputs_as_if_alone(jobs, requests, sizes["windows"])


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "times"),
    [
        (4, 5, 0),  # the ninth token is chosen, but nothing is computed from it
        (4, 6, 1),
        (8, 1, 0),
        (8, 2, 1),
        (9, 9, 0),  # long from the beginning
    ],
)
@pytest.mark.parametrize("run_ahead", [1, 2])
def test_a_request_begins_anew_once_and_only_when_it_must(
    prompt_len: int, max_tokens: int, times: int, run_ahead: int
) -> None:
    engine, _ = make(run_ahead=run_ahead, long_rope_len=8)
    for name in "ab":
        engine.add(name, [1] * prompt_len, replace(Job(()), max_tokens=max_tokens).params)
    run_to_end(engine)
    assert engine.stats.preemptions == 2 * times
    assert_idle(engine)


@settings(max_examples=200)
@given(sizes=engines(caching=True), jobs=WORKLOADS)
def test_prefix_caching_changes_no_token(sizes: dict[str, Any], jobs: list[Job]) -> None:
    jobs = [replace(job, abort_after=None) for job in jobs]
    outputs = []
    for caching in (True, False):
        engine, _ = make(**{**sizes, "enable_prefix_caching": caching})
        outputs.append([request.output_token_ids for request in serve(engine, jobs)])
        assert caching or engine.stats.cached_tokens == 0
    assert outputs[0] == outputs[1]


@settings(max_examples=25)
@given(sizes=engines(), jobs=WORKLOADS)
def test_every_token_budget_of_a_step_gives_the_same_tokens(
    sizes: dict[str, Any], jobs: list[Job]
) -> None:
    jobs = [replace(job, abort_after=None) for job in jobs]
    windows = sizes["windows"]
    for budget in range(1, MAX_LEN + 2):
        one = most_pages(windows, MAX_LEN, sizes["page_size"], (sizes["run_ahead"] + 1) * budget)
        engine, _ = make(**{**sizes, "max_step_tokens": budget, "num_pages": one + 3})
        assert_outputs_as_if_alone(jobs, serve(engine, jobs), windows)


@settings(max_examples=100)
@given(sizes=engines(), jobs=WORKLOADS, data=st.data())
def test_the_order_of_arrival_changes_no_token(
    sizes: dict[str, Any], jobs: list[Job], data: st.DataObject
) -> None:
    jobs = [replace(job, abort_after=None) for job in data.draw(st.permutations(jobs))]
    assert_outputs_as_if_alone(jobs, serve(make(**sizes)[0], jobs), sizes["windows"])


@settings(max_examples=200)
@given(sizes=engines(), jobs=WORKLOADS, data=st.data())
def test_bad_logits_end_only_their_own_request(
    sizes: dict[str, Any], jobs: list[Job], data: st.DataObject
) -> None:
    bad = data.draw(st.sets(st.sampled_from(range(len(jobs)))))
    engine, _ = make(**sizes, fail_rows={str(index) for index in bad})
    requests = serve(engine, jobs)
    good = [index for index in range(len(jobs)) if index not in bad]
    kept = [jobs[i] for i in good], [requests[i] for i in good]
    assert_outputs_as_if_alone(*kept, sizes["windows"])
    for index in bad:
        assert requests[index].finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
        assert requests[index].output_token_ids == []


class EngineMachine(RuleBasedStateMachine):
    """Requests come and are aborted between any two steps."""

    @initialize(sizes=engines())
    def start(self, sizes: dict[str, Any]) -> None:
        self.engine, _ = make(**sizes)
        self.windows = sizes["windows"]
        self.jobs: list[Job] = []
        self.requests: list[Request] = []

    @rule(job=JOBS)
    def add(self, job: Job) -> None:
        request_id = str(len(self.jobs))
        self.jobs.append(job)
        self.requests.append(self.engine.add(request_id, job.prompt, job.params, job.salt))

    @precondition(lambda self: self.engine.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(list(self.engine.scheduler.requests)))
        self.jobs[int(request_id)] = replace(self.jobs[int(request_id)], abort_after=0)
        self.engine.abort(request_id)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()
            self.engine.scheduler.check_integrity()

    @precondition(lambda self: not self.engine.has_unfinished_requests)
    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.scheduler.allocator.reset_prefix_cache()

    @invariant()
    def books_balance(self) -> None:
        self.engine.scheduler.check_integrity()
        assert_first_come_first_served(self.engine)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            run_to_end(self.engine)
            assert_idle(self.engine)
            assert_outputs_as_if_alone(self.jobs, self.requests, self.windows)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=300, stateful_step_count=30)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_requests_through_a_small_pool(seed: int) -> None:
    draw = random.Random(seed)
    jobs = [
        Job(
            prompt=tuple(draw.choices((0, 1), k=draw.randint(1, 16))),
            max_tokens=draw.randint(1, 12),
            seed=draw.choice((None, draw.randrange(9))),
            stop_token_ids=tuple(draw.sample(range(VOCAB), draw.randrange(3))),
            arrival=draw.randrange(100),
            abort_after=draw.choice((None, None, None, draw.randrange(30))),
        )
        for _ in range(200)
    ]
    engine, _ = make(num_pages=24, page_size=3, max_rows=8, max_step_tokens=16)
    assert_outputs_as_if_alone(jobs, serve(engine, jobs))
    assert engine.stats.preemptions > 0
    assert engine.stats.cached_tokens > 0
    assert sum(engine.stats.finished.values()) == 200


# --- one fact each ----------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_requests_go_on_with_the_same_tokens(caching: bool) -> None:
    engine, _ = make(num_pages=14, page_size=2, max_rows=4, enable_prefix_caching=caching)
    jobs = [Job((index, 1, 2, 3), max_tokens=14, seed=index) for index in range(4)]
    requests = serve(engine, jobs)
    assert_outputs_as_if_alone(jobs, requests)
    assert engine.stats.preemptions == sum(request.num_preemptions for request in requests) > 0
    assert requests[0].num_preemptions == 0, "the oldest request never loses its pages"


def test_the_youngest_request_is_preempted_and_waits_first_in_line() -> None:
    engine, _ = make(num_pages=14, page_size=2, max_rows=3)
    old, middle, young, waiting = [
        engine.add(name, [index] * 4, SamplingParams(max_tokens=18))
        for index, name in enumerate(["old", "middle", "young", "waiting"])
    ]
    while not engine.stats.preemptions:
        engine.step()
    assert engine.scheduler.running.requests == [old, middle]
    assert list(engine.scheduler.waiting) == [young, waiting]
    assert (young.pages, young.row) == ([], -1)


def test_the_worst_priority_is_preempted_first_and_the_youngest_of_it() -> None:
    """Though the two that lose their pages are older than one that keeps them."""
    engine, _ = make(num_pages=14, page_size=2, max_rows=4)
    priorities = {"low old": 5, "normal": 0, "low young": 5, "urgent": -1}
    requests = {
        name: engine.add(name, [index] * 3, SamplingParams(max_tokens=18), priority=priority)
        for index, (name, priority) in enumerate(priorities.items())
    }
    order = []
    while engine.has_unfinished_requests:
        before = {name: request.num_preemptions for name, request in requests.items()}
        engine.step()
        engine.scheduler.check_integrity()
        lost = [name for name in requests if requests[name].num_preemptions > before[name]]
        order += sorted(lost, key=lambda name: name == "low old")
    assert order[:2] == ["low young", "low old"]
    assert "urgent" not in order
    for index, request in enumerate(requests.values()):
        assert request.output_token_ids == naive([index] * 3, 18, VOCAB, request.seed)


def test_a_lower_priority_number_is_admitted_first() -> None:
    engine, _ = make(max_rows=1)
    asked = {"first": 0, "late": 1, "normal": 0, "urgent": -7, "normal too": 0}
    for name, priority in asked.items():
        engine.add(name, [1, 2], SamplingParams(max_tokens=2), priority=priority)
    ended = [u.request.request_id for u in run_to_end(engine) if u.finish_reason]
    assert ended == ["urgent", "first", "normal", "normal too", "late"]


@given(
    jobs=st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 9), st.integers(1, 9)), max_size=8),
    sizes=engines(),
)
def test_priorities_change_no_token(
    jobs: list[tuple[int, int, int]], sizes: dict[str, Any]
) -> None:
    engine, _ = make(**sizes)
    requests = []
    for index, (priority, length, max_tokens) in enumerate(jobs):
        params = SamplingParams(max_tokens=max_tokens)
        requests.append(engine.add(str(index), [index] * length, params, priority=priority))
        engine.step()
    run_to_end(engine)
    for index, (_, length, max_tokens) in enumerate(jobs):
        seed, windows = requests[index].seed, sizes["windows"]
        want = naive([index] * length, max_tokens, VOCAB, seed, windows=windows)
        assert requests[index].output_token_ids == want
    assert_idle(engine)


def test_hits_after_a_preemption_are_not_counted_as_cached_tokens() -> None:
    engine, _ = make(num_pages=14, page_size=2, max_rows=4)
    requests = serve(engine, [Job((index, 1, 2, 3), max_tokens=14) for index in range(4)])
    assert engine.stats.preemptions > 0
    assert [request.num_cached_tokens for request in requests] == [0] * 4
    assert (engine.stats.prompt_tokens, engine.stats.cached_tokens) == (16, 0)


def test_a_newcomer_leaves_one_free_page_to_each_request_that_runs() -> None:
    engine, _ = make(num_pages=13, page_size=2, max_rows=8)
    for index in range(6):
        engine.add(str(index), [index, 1, 2], SamplingParams(max_tokens=2))
    engine.step()
    scheduler = engine.scheduler
    assert len(scheduler.running) == 4, "4 * 2 pages, and 4 of 12 left; a fifth would leave 2"
    assert scheduler.allocator.num_free == 4
    run_to_end(engine)
    assert engine.stats.preemptions == 0


def test_an_equal_prefix_is_computed_once() -> None:
    engine, _ = make(page_size=4)
    prompt = tuple(range(10))
    jobs = [Job(prompt, arrival=0), Job(prompt, arrival=20), Job(prompt[:8], arrival=40)]
    assert [request.num_cached_tokens for request in serve(engine, jobs)] == [0, 8, 4]
    assert engine.stats.cached_tokens == 12
    assert engine.stats.prompt_tokens == 28


def test_output_is_a_prefix_for_the_next_turn() -> None:
    engine, _ = make(page_size=4)
    first = Job(tuple(range(6)), max_tokens=7)
    (request,) = serve(engine, [first])
    assert request.token_ids[:6] == list(first.prompt)
    second = engine.add("next", [*request.token_ids, 1], SamplingParams(max_tokens=1))
    run_to_end(engine)
    assert second.num_cached_tokens == 12, "all but the last token, which no step computed"


def test_an_equal_page_behind_another_beginning_is_no_hit() -> None:
    engine, _ = make(page_size=2)
    prompts = [(1, 1, 2, 2, 9), (3, 3, 4, 4, 9), (1, 1, 4, 4, 9)]
    jobs = [Job(prompt, arrival=20 * index) for index, prompt in enumerate(prompts)]
    requests = serve(engine, jobs)
    assert [request.num_cached_tokens for request in requests] == [0, 0, 2]
    assert_outputs_as_if_alone(jobs, requests)


def test_tenants_with_other_salts_share_nothing() -> None:
    engine, _ = make(page_size=2)
    jobs = [Job((1, 2, 3, 4, 5), salt=salt, arrival=at) for at, salt in [(0, "a"), (20, "b")]]
    assert [request.num_cached_tokens for request in serve(engine, jobs)] == [0, 0]


def test_a_long_prompt_is_cut_into_chunks_beside_requests_that_decode() -> None:
    engine, runner = make(max_step_tokens=4)
    engine.add("decodes", [1], SamplingParams(max_tokens=12))
    engine.step()
    long = engine.add("long", [2] * 10, SamplingParams(max_tokens=1))
    computed = []
    while long.status is not Status.FINISHED:
        engine.step()
        computed += engine.scheduler.running.columns.num_computed_tokens[1:].tolist()
    assert computed == [3, 6, 9, 10]
    assert runner.num_sampled >= 4, "the other one got a token in every step"


def sizes_of_steps(scheduler: Scheduler, count: int) -> list[int]:
    """Tokens of the next steps; each is known before the next begins."""
    sizes = []
    for _ in range(count):
        decision = scheduler.schedule()
        sizes.append(decision.num_tokens)
        scheduler.update(decision, StepResult([1] * decision.num_lanes))
    return sizes


def scheduler_for_sizes(max_rows: int = 8) -> Scheduler:
    """Its programs hold 16, 32 or 64 tokens; there are pages for all."""
    return Scheduler(PageAllocator(999, 4, False), max_rows, 64, Stats(), (16, 32, 64))


def add_prompt(scheduler: Scheduler, length: int, max_tokens: int = 99) -> Request:
    name = str(len(scheduler.requests))
    request = Request(name, [0] * length, SamplingParams(), max_tokens)
    scheduler.add(request)
    return request


@pytest.mark.parametrize(
    ("length", "sizes"), [(32, [32, 1]), (31, [31, 1]), (40, [32, 8, 1]), (50, [50, 1, 1])]
)
def test_a_prompt_is_cut_where_it_fills_a_step(length: int, sizes: list[int]) -> None:
    """Not where that leaves as many places empty: 50 tokens need 64 places, or 32 and 32."""
    scheduler = scheduler_for_sizes()
    add_prompt(scheduler, length)
    assert sizes_of_steps(scheduler, len(sizes)) == sizes


def test_prompts_that_find_no_pages_do_not_count() -> None:
    """With them the step would be full: 40 + 24 tokens."""
    scheduler = Scheduler(PageAllocator(1 + 10 + 4, 4, False), 8, 64, Stats(), (16, 32, 64))
    add_prompt(scheduler, 40)
    add_prompt(scheduler, 24)
    assert sizes_of_steps(scheduler, 2) == [32, 8]


def test_prompts_that_come_while_others_decode_fill_the_steps() -> None:
    scheduler = scheduler_for_sizes()
    for _ in range(4):
        add_prompt(scheduler, 4)
    assert sizes_of_steps(scheduler, 2) == [16, 4]
    for _ in range(2):
        add_prompt(scheduler, 9)
    assert sizes_of_steps(scheduler, 3) == [16, 5 + 6, 6], "22 tokens: 16, then those left"


def test_a_queue_is_held_back_until_its_prompts_fill_a_step() -> None:
    """Eight rows; three requests end one after the other while five wait."""
    scheduler = scheduler_for_sizes()
    for index in range(8):
        add_prompt(scheduler, 2, max_tokens=index + 2 if index < 3 else 99)
    assert sizes_of_steps(scheduler, 1) == [16]
    for _ in range(5):
        add_prompt(scheduler, 4)
    assert sizes_of_steps(scheduler, 3) == [8, 7, 6]
    assert sizes_of_steps(scheduler, 2) == [16, 8], "5 and 3 * 4 are 17: one is left"


def test_a_queue_is_held_back_for_four_steps_at_most() -> None:
    scheduler = scheduler_for_sizes()
    add_prompt(scheduler, 2, max_tokens=2)
    for _ in range(7):
        add_prompt(scheduler, 2)
    sizes_of_steps(scheduler, 2)
    for _ in range(2):
        add_prompt(scheduler, 4)
    assert sizes_of_steps(scheduler, 6) == [7, 7, 7, 7, 7 + 4, 8]


def test_a_request_that_finds_a_free_row_and_no_queue_starts_at_once() -> None:
    scheduler = scheduler_for_sizes()
    for _ in range(6):
        add_prompt(scheduler, 2)
    sizes_of_steps(scheduler, 1)
    for _ in range(2):
        add_prompt(scheduler, 2)
    assert sizes_of_steps(scheduler, 1) == [6 + 2 * 2]


def test_who_decodes_gets_a_token_in_every_step_whatever_waits() -> None:
    draw, scheduler = random.Random(0), scheduler_for_sizes()
    for _ in range(100):
        add_prompt(scheduler, draw.randint(1, 150), max_tokens=draw.randint(1, 20))
    while scheduler.requests:
        decoding = {r for r in scheduler.running.requests if r.output_token_ids}
        decision = scheduler.schedule()
        assert decoding <= set(decision.requests)
        scheduler.update(decision, StepResult([1] * decision.num_lanes))


def test_filling_steps_leaves_few_places_empty() -> None:
    """A long queue of requests of all lengths: what a step can't fill waits for the next."""
    sizes, waste = (16, 32, 64, 128), []
    for policy in ((), sizes):
        draw = random.Random(0)
        scheduler = Scheduler(PageAllocator(9999, 4, False), 8, 128, Stats(), policy)
        for _ in range(300):
            add_prompt(scheduler, draw.randint(1, 40), max_tokens=draw.randint(1, 40))
        places = tokens = 0
        while scheduler.requests:
            (step,) = sizes_of_steps(scheduler, 1)
            places += next(size for size in (8, *sizes) if size >= step)
            tokens += step
        waste.append(1 - tokens / places)
    assert waste[1] < waste[0] / 2


def test_a_step_is_dispatched_before_the_one_before_is_known() -> None:
    engine, _ = make()
    request = engine.add("a", [1, 2], SamplingParams(max_tokens=5))
    assert engine.step() == []
    columns = engine.scheduler.running.columns
    assert (columns.num_tokens.tolist(), request.output_token_ids) == ([3], [])
    (update,) = engine.step()
    assert update.token_id == request.output_token_ids[0]
    assert columns.num_tokens.tolist() == [4], "the second token is under way"


def test_the_surplus_token_of_a_step_that_ran_ahead_is_dropped() -> None:
    job = Job((1, 2, 3), max_tokens=10)
    stop = job.oracle((None,))[3]
    job = replace(job, stop_token_ids=(stop,))
    engine, runner = make()
    request = engine.add("a", job.prompt, job.params)
    updates = run_to_end(engine)
    assert (
        [update.token_id for update in updates] == job.oracle((None,)) == request.output_token_ids
    )
    assert [update.finish_reason for update in updates] == [None] * 3 + [FinishReason.STOP]
    assert runner.num_sampled == 5
    assert engine.stats.generation_tokens == 4


def test_no_surplus_token_is_computed_when_the_end_is_known_beforehand() -> None:
    engine, runner = make()
    engine.add("a", [1, 2, 3], SamplingParams(max_tokens=4))
    run_to_end(engine)
    assert runner.num_sampled == 4


@pytest.mark.parametrize("max_step_tokens", [4, 30])
def test_pages_of_a_request_with_bad_logits_are_not_found_again(max_step_tokens: int) -> None:
    engine, runner = make(page_size=2, max_step_tokens=max_step_tokens, fail_rows={"bad"})
    prompt = [1, 2, 3, 4, 5, 6, 7]
    bad = engine.add("bad", prompt, SamplingParams())
    updates = run_to_end(engine)
    assert updates == [RequestUpdate(bad, None, None, FinishReason.ERROR)]
    runner.fail_rows.clear()
    again = engine.add("again", prompt, SamplingParams(temperature=0, max_tokens=3))
    run_to_end(engine)
    assert again.num_cached_tokens == 0
    assert again.output_token_ids == naive(prompt, 3, VOCAB)
    assert engine.stats.finished == {"error": 1, "length": 1}


def test_pages_of_an_aborted_step_are_not_found_again() -> None:
    engine, _ = make(page_size=2)
    engine.add("gone", [1, 2, 3, 4, 5], SamplingParams())
    engine.step()
    engine.abort("gone")
    again = engine.add("again", [1, 2, 3, 4, 5], SamplingParams())
    run_to_end(engine)
    assert again.num_cached_tokens == 0


def test_a_step_before_a_preemption_makes_no_page_findable_that_came_after_it() -> None:
    """The prompt loses its pages when half of it is computed, and has new ones when the last step
    that wrote to the old ones completes."""
    scheduler = Scheduler(PageAllocator(10, 2, True), max_rows=3, max_step_tokens=3, stats=Stats())
    prompt = list(range(12))
    scheduler.add(Request("decodes", [20, 21], SamplingParams(), max_tokens=20))
    scheduler.add(Request("long", prompt, SamplingParams(), max_tokens=4))
    for _ in range(4):
        decision = scheduler.schedule()
        scheduler.update(decision, StepResult([9] * decision.num_lanes))
    late = scheduler.schedule()
    assert late.start.tolist()[1:] == [7], "the step fills the fourth page"
    scheduler.schedule()
    assert scheduler.stats.preemptions == 1
    scheduler.abort("decodes")
    again = scheduler.schedule()
    assert again.start.tolist() == [6], "the first three pages are found"
    scheduler.update(late, StepResult([9] * late.num_lanes))
    other = Request("other", prompt, SamplingParams(), max_tokens=4)
    scheduler.add(other)
    scheduler.abort("long")
    scheduler.schedule()
    assert other.num_cached_tokens == 6


def test_aborting_is_possible_at_any_moment_and_twice() -> None:
    for moment in range(8):
        engine, _ = make(max_step_tokens=2)
        request = engine.add("a", [1, 2, 3], SamplingParams(max_tokens=3))
        for _ in range(moment):
            engine.step()
        done = request.status is Status.FINISHED
        engine.abort("a")
        engine.abort("a")
        engine.abort("never heard of")
        assert run_to_end(engine) == []
        assert request.finish_reason is (FinishReason.LENGTH if done else FinishReason.ABORT)
        assert_idle(engine)


def test_an_id_can_be_used_again_while_its_last_step_is_still_under_way() -> None:
    engine, _ = make()
    first = engine.add("a", [1, 2], SamplingParams(temperature=0))
    engine.step()
    engine.abort("a")
    second = engine.add("a", [3, 4], SamplingParams(temperature=0, max_tokens=4))
    run_to_end(engine)
    assert first.output_token_ids == []
    assert second.output_token_ids == naive([3, 4], 4, VOCAB)


def test_an_update_must_have_an_entry_per_scheduled_request() -> None:
    scheduler = scheduler_with(Request("a", [1], SamplingParams(), max_tokens=4))
    decision = scheduler.schedule()
    with pytest.raises(ValueError):
        scheduler.update(decision, StepResult([]))


def test_no_more_than_max_rows_requests_run() -> None:
    engine, _ = make(max_rows=2)
    for index in range(5):
        engine.add(str(index), [index], SamplingParams(max_tokens=3))
    while engine.has_unfinished_requests:
        engine.step()
        assert len(engine.scheduler.running) <= 2


def test_check_integrity_notices_a_lost_row_and_a_lost_request() -> None:
    engine, _ = make(max_rows=2)
    request = engine.add("a", [1], SamplingParams())
    engine.scheduler.waiting.remove(request)
    with pytest.raises(RuntimeError, match="no queue"):
        engine.scheduler.check_integrity()
    engine.scheduler.waiting.add(request)
    engine.step()
    engine.scheduler.running.requests[0].row = 1
    with pytest.raises(RuntimeError, match="rows"):
        engine.scheduler.check_integrity()


def scheduler_with(*requests: Request) -> Scheduler:
    scheduler = Scheduler(PageAllocator(8, 4, True), 2, 8, Stats())
    for request in requests:
        scheduler.add(request)
    return scheduler


def test_scheduled_token_ids_mark_the_one_that_only_the_device_knows() -> None:
    scheduler = scheduler_with(Request("a", [5, 6], SamplingParams(), max_tokens=4))
    decisions = [scheduler.schedule() for _ in range(2)]
    assert [decision.token_ids.tolist() for decision in decisions] == [[5, 6], [-1]]
    assert [decision.start.tolist() for decision in decisions] == [[0], [2]]
    assert [decision.output_index.tolist() for decision in decisions] == [[0], [1]]


def test_the_cells_of_the_page_table_are_entered_once() -> None:
    scheduler = scheduler_with(Request("a", [5] * 7, SamplingParams(), max_tokens=9))
    pages = [scheduler.schedule().table_updates.tolist() for _ in range(7)]
    assert pages == [[[0, 0, 1], [0, 1, 2]], [], [[0, 2, 3]], [], [], [], [[0, 3, 4]]]


def test_a_request_with_all_its_tokens_under_way_has_nothing_to_schedule() -> None:
    scheduler = scheduler_with(Request("a", [5, 6], SamplingParams(), max_tokens=2))
    decisions = [scheduler.schedule() for _ in range(3)]
    assert [decision.ends.tolist() for decision in decisions] == [[False], [True], []]


def test_logprobs_are_handed_on() -> None:
    scheduler = scheduler_with(Request("a", [1], SamplingParams(), max_tokens=4))
    logprobs = object()
    result = StepResult([7], [logprobs])  # type: ignore[list-item]
    (update,) = scheduler.update(scheduler.schedule(), result)
    assert (update.token_id, update.logprobs) == (7, logprobs)


# --- sliding windows --------------------------------------------------------------------------


def most_held(windows: Sequence[int | None], length: int) -> int:
    """Most pages of four tokens that a sequence holds while it is computed in steps of 8 tokens."""
    engine, _ = make(
        num_pages=400, page_size=4, max_step_tokens=8, max_model_len=length, windows=windows
    )
    request = engine.add("a", [1] * (length // 2), SamplingParams(temperature=0, max_tokens=length))
    most = 0
    while engine.has_unfinished_requests:
        engine.step()
        engine.scheduler.check_integrity()
        most = max(most, held(request.pages))
    assert request.output_token_ids == naive(
        [1] * (length // 2), length - length // 2, VOCAB, windows=windows
    )
    return most


def test_pages_that_no_layer_sees_any_more_are_given_back() -> None:
    whole = most_held((None,), 400)
    assert whole == 100
    # A window of 12 tokens, and 8 more in each of the two steps that are under way: 7 pages, and
    # one that is seen in part.
    assert most_held((12,), 400) <= 8
    assert most_held((12,), 400) == most_held((12,), 200)
    assert most_held((None, 12, 12), 400) <= whole + 2 * 8


def test_a_short_window_lets_many_more_requests_run() -> None:
    """Three quarters of the layers have one: twice as many run in the same memory."""

    def most_running(windows: Sequence[int | None]) -> int:
        engine, _ = make(
            num_pages=1 + 4 * 100 * len(windows),
            page_size=4,
            max_rows=16,
            max_step_tokens=32,
            max_model_len=400,
            windows=windows,
        )
        for index in range(16):
            engine.add(str(index), [index] * 300, SamplingParams(temperature=0, max_tokens=99))
        most = 0
        while engine.has_unfinished_requests:
            engine.step()
            most = max(most, len(engine.scheduler.running))
        return most

    assert most_running((None, 8, 8, 8)) >= 2 * most_running((None,))


def test_a_prefix_is_found_though_the_window_has_left_its_beginning() -> None:
    engine, _ = make(num_pages=60, page_size=2, max_step_tokens=4, windows=(None, 4))
    first = engine.add("first", [0, 1] * 8, SamplingParams(temperature=0, max_tokens=2))
    run_to_end(engine)
    second = engine.add("second", [0, 1] * 8, SamplingParams(temperature=0, max_tokens=2))
    run_to_end(engine)
    assert second.num_cached_tokens == 14
    assert second.output_token_ids == first.output_token_ids
