"""A runner without a model: the next token is a hash of what is read back from the pages.

A slot holds a hash of its token and of the slot before, as a real key depends on all tokens before
it. So any fault in paging, prefix sharing, preemption or scheduling changes the tokens, and
``naive`` says what they should have been. Nothing here is fast or clever: it is what the engine is
compared with.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.core import Engine
from jaxserve.engine.decision import Decision, StepResult
from jaxserve.engine.page_allocator import PADDING_PAGE, PageAllocator
from jaxserve.engine.request import PromptRead, Request, RequestUpdate
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats

COLUMNS = 1024
"""Of the page tables: more than a request can have."""
UNWRITTEN = -7
"""What a slot or a row holds before anything was written to it."""


def hash_of(*numbers: int) -> int:
    """A number of 63 bits."""
    return int.from_bytes(hashlib.blake2b(f"{numbers}".encode(), digest_size=8).digest()) >> 1


def key_of(token: int, keys_before: Sequence[int]) -> int:
    """What a token leaves in its slot."""
    return hash_of(token, *keys_before[-1:])


def next_token(keys: Sequence[int], vocab_size: int, seed: int | None, output_index: int) -> int:
    """The "model": depends on every slot and, unless greedy (seed None), on which draw it is."""
    draw = () if seed is None else (seed, output_index)
    return hash_of(*keys, *draw) % vocab_size


def naive(
    prompt: Sequence[int],
    max_tokens: int,
    vocab_size: int,
    seed: int | None = None,
    stop_token_ids: Collection[int] = (),
    min_tokens: int = 0,
    windows: Sequence[int | None] = (None,),
) -> list[int]:
    """The output of a request that is alone in the world; seed None means greedy."""
    output: list[int] = []
    keys: list[int] = []
    for token in prompt:
        keys.append(key_of(token, keys))
    while len(output) < max_tokens:
        seen = [key for window in windows for key in (keys[-window:] if window else keys)]
        output.append(next_token(seen, vocab_size, seed, len(output)))
        keys.append(key_of(output[-1], keys))
        if output[-1] in stop_token_ids and len(output) >= min_tokens:
            break
    return output


@dataclass(frozen=True)
class Lane:
    """What is uploaded for one scheduled request: nothing in it changes after dispatch."""

    row: int
    new_row: bool
    start: int
    token_ids: tuple[int, ...]
    samples: bool
    output_index: int
    seed: int | None
    fails: bool

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)


def _pooled(decision: Decision, lanes: list[Lane]) -> list[tuple[Request, PromptRead]]:
    """Of requests for embeddings: the sum of the tokens of this piece of their prompts, and their
    number."""
    sums = np.array([[sum(lane.token_ids), len(lane.token_ids)] for lane in lanes], np.float32)
    return [
        (request, PromptRead(lane.start, pooled=pooled))
        for request, lane, pooled in zip(decision.requests, lanes, sums)
        if request.pooling is not None
    ]


@dataclass(eq=False)
class Step:
    """The handle of a dispatched step."""

    number: int
    lanes: list[Lane]
    cells: list[list[int]]
    reads: list[tuple[Request, PromptRead]]
    token_ids: list[int] | None = None


class FakeRunner:
    """A Runner that checks every decision and computes it late, in the order of dispatch.

    Args:
        num_pages, page_size, max_rows, vocab_size: of the pretended device and model.
        max_step_tokens: most tokens in a step, if that is to be checked.
        fail_rows: ids of requests whose logits are bad.
        long_rope_len: see Scheduler.
        windows: of the pretended model's page tables.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_rows: int,
        vocab_size: int,
        max_step_tokens: int | None = None,
        fail_rows: Collection[str] = (),
        long_rope_len: int | None = None,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self.windows = tuple(windows)
        self.page_size = page_size
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.max_step_tokens = max_step_tokens
        self.fail_rows = set(fail_rows)
        self.long_rope_len = long_rope_len
        self.closed = False
        self.num_sampled = 0
        self._num_pages = num_pages
        self._num_dispatched = 0
        self.allocate()

    def allocate(self) -> None:
        """Empties the device, and forgets the steps that were dispatched and not collected."""
        # The device's memory: only _execute touches it.
        count = len(self.windows) * self.max_rows
        self._page_table = [[PADDING_PAGE] * COLUMNS for _ in range(count)]
        self._pool = [[UNWRITTEN] * self.page_size for _ in range(self._num_pages)]
        self._last_token = [UNWRITTEN] * self.max_rows
        # The stream: dispatched steps that were not computed yet.
        self._stream: deque[Step] = deque()
        self._num_collected = self._num_dispatched
        # What the checks remember of each row and page.
        self._holder: dict[int, tuple[Request, int]] = {}
        self._pages: dict[tuple[int, int], list[int]] = {}
        self._end: dict[int, int] = {}
        self._writer = [0] * self._num_pages
        self._is_long = [False] * self._num_pages

    def dispatch(self, decision: Decision) -> Step:
        """Takes note of the step, and computes the ones before it."""
        assert not self.closed
        self._execute_until(self._num_dispatched)
        self._num_dispatched += 1
        lanes = self._lanes(decision)
        self._check(decision, lanes)
        reads = _pooled(decision, lanes)
        step = Step(self._num_dispatched, lanes, decision.table_updates.tolist(), reads)
        self._stream.append(step)
        return step

    def collect(self, step: Step) -> StepResult:
        """The tokens of the oldest step that was not collected yet."""
        assert not self.closed
        assert step.number == self._num_collected + 1, "collected twice or out of order"
        self._execute_until(step.number)
        self._num_collected = step.number
        assert step.token_ids is not None
        return StepResult(step.token_ids, prompt_reads=step.reads)

    def close(self) -> None:
        """Refuses all further work."""
        assert not self.closed, "closed twice"
        self.closed = True

    # --- the device ---------------------------------------------------------------------------

    def _execute_until(self, number: int) -> None:
        while self._stream and self._stream[0].number <= number:
            self._execute(self._stream.popleft())

    def _execute(self, step: Step) -> None:
        for lane in step.lanes:
            if lane.new_row:
                for row in self._rows(lane.row):
                    self._page_table[row] = [PADDING_PAGE] * COLUMNS
        for row, column, page in step.cells:
            self._page_table[row][column] = page
        for lane in step.lanes:
            for position, token in enumerate(lane.token_ids, lane.start):
                known = self._last_token[lane.row] if token == -1 else token
                for row in self._rows(lane.row):
                    page, slot = self._place(row, position)
                    before = self._read(row, max(position - 1, 0), position)
                    self._pool[page][slot] = key_of(known, before)
        # What stands for a lane that samples nothing must not matter: it isn't a token here.
        step.token_ids = [self._sample(lane) if lane.samples else UNWRITTEN for lane in step.lanes]

    def _sample(self, lane: Lane) -> int:
        keys = []
        for row, window in zip(self._rows(lane.row), self.windows):
            keys += self._read(row, max(lane.end - (window or lane.end), 0), lane.end)
        token = next_token(keys, self.vocab_size, lane.seed, lane.output_index)
        self._last_token[lane.row] = token
        self.num_sampled += 1
        return -1 if lane.fails else token

    def _rows(self, row: int) -> range:
        """A row of every table, as the page tables lie one below the other."""
        return range(row, len(self.windows) * self.max_rows, self.max_rows)

    def _read(self, row: int, start: int, end: int) -> list[int]:
        places = [self._place(row, position) for position in range(start, end)]
        return [self._pool[page][slot] for page, slot in places]

    def _place(self, row: int, position: int) -> tuple[int, int]:
        return self._page_table[row][position // self.page_size], position % self.page_size

    # --- the host -----------------------------------------------------------------------------

    def _lanes(self, decision: Decision) -> list[Lane]:
        token_ids, lanes = decision.token_ids.tolist(), []
        for lane, request in enumerate(decision.requests):
            count = int(decision.num_scheduled_tokens[lane])
            lanes.append(
                Lane(
                    row=int(decision.row[lane]),
                    new_row=lane >= decision.num_lanes - decision.num_new_rows,
                    start=int(decision.start[lane]),
                    token_ids=tuple(token_ids[:count]),
                    samples=bool(decision.samples[lane]),
                    output_index=int(decision.output_index[lane]),
                    seed=None if request.params.greedy else request.seed,
                    fails=request.request_id in self.fail_rows,
                )
            )
            assert count > 0, "a lane without tokens"
            token_ids = token_ids[count:]
        assert not token_ids, "more tokens than the lanes have"
        return lanes

    def _check(self, decision: Decision, lanes: list[Lane]) -> None:
        assert lanes, "an empty step"
        assert len({lane.row for lane in lanes}) == len(lanes), "a row twice"
        assert len(set(decision.requests)) == len(lanes), "a request twice"
        if self.max_step_tokens is not None:
            assert decision.num_tokens <= self.max_step_tokens, "over the token budget"
        for at, (request, lane) in enumerate(zip(decision.requests, lanes)):
            self._check_row(request, int(decision.num_preemptions[at]), lane)
            assert decision.num_prompt_tokens[at] == request.num_prompt_tokens
        for row, column, page in decision.table_updates.tolist():
            table, row = divmod(row, self.max_rows)
            assert any(row == lane.row for lane in lanes), "a page for a row without tokens"
            assert column == len(self._pages[table, row]), "columns are skipped or written again"
            self._pages[table, row].append(page)
        live = [request for row, (request, _) in self._holder.items() if request.row == row]
        owners = Counter(page for request in live for table in request.pages for page in table)
        for request, lane in zip(decision.requests, lanes):
            self._check_pages(request, lane, owners)
        if self.long_rope_len is not None:
            for lane, length in zip(lanes, decision.rope_length.tolist()):
                self._check_rotation(lane, length, self.long_rope_len)

    def _check_row(self, request: Request, num_preemptions: int, lane: Lane) -> None:
        """A row belongs to one request from its new_row on, and its positions have no gap."""
        row = lane.row
        assert 0 <= row < self.max_rows and request.row == row
        if lane.new_row:
            previous = self._holder.get(row, (None, 0))[0]
            assert previous is None or previous is request or previous.row != row, "row is taken"
            self._holder[row] = request, num_preemptions
            for table in range(len(self.windows)):
                self._pages[table, row] = []
            assert lane.start % self.page_size == 0, "a hit on part of a page"
        else:
            assert self._holder[row] == (request, num_preemptions), "row has another request"
            assert lane.start == self._end[row], "a gap between steps"
        self._end[row] = lane.end
        unknown = [at for at, token in enumerate(lane.token_ids) if token == -1]
        assert unknown in ([], [len(lane.token_ids) - 1]), "an unknown token before the last"
        assert not (unknown and lane.new_row), "the last token of a new row is unknown"
        length = request.num_prompt_tokens + lane.output_index
        assert lane.samples == (lane.end == length), "a token is chosen after the last one only"

    def _check_pages(self, request: Request, lane: Lane, owners: Counter[int]) -> None:
        """Tokens go to pages with one owner; what was computed before lies in finished pages."""
        first, end = lane.start // self.page_size, (lane.end - 1) // self.page_size + 1
        for table, window in enumerate(self.windows):
            pages, own = self._pages[table, lane.row], request.pages[table]
            assert len(pages) == len(own), "the row's page table is not the request's"
            seen = 0 if window is None else max(lane.start - window + 1, 0) // self.page_size
            for column, page in enumerate(own):
                assert page in (pages[column], PADDING_PAGE), "the table is not the request's"
                assert page != PADDING_PAGE or column < seen, "a page is gone that is seen"
            assert end <= len(own), "tokens without a page"
            for page in own[first:end]:
                assert owners[page] == 1, f"page {page} is written but has {owners[page]} owners"
                self._writer[page] = self._num_dispatched
            for page in own[seen:first] if lane.new_row else ():
                assert 0 < self._writer[page] <= self._num_collected, "a hit before it is written"

    def _check_rotation(self, lane: Lane, length: int, limit: int) -> None:
        """A lane reads keys that were rotated as its own are, short ones up to the limit only."""
        is_long = length > limit
        assert is_long or lane.end <= limit, "a short request beyond the limit"
        size = self.page_size
        for table, window in enumerate(self.windows):
            pages = self._pages[table, lane.row]
            seen = 0 if window is None else max(lane.start - window + 1, 0) // size
            for page in pages[seen : -(-lane.start // size)]:
                assert self._is_long[page] == is_long, "keys of both kinds"
            for page in pages[lane.start // size : -(-lane.end // size)]:
                self._is_long[page] = is_long


def fake_engine(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_rows: int = 8,
    max_step_tokens: int = 16,
    step_sizes: Sequence[int] = (),
    max_model_len: int | None = None,
    vocab_size: int = 100,
    enable_prefix_caching: bool = True,
    fail_rows: Collection[str] = (),
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
    run_ahead: int = 1,
    max_failures: int = 1,
    long_rope_len: int | None = None,
    windows: Sequence[int | None] = (None,),
) -> tuple[Engine, FakeRunner]:
    """An engine on a fake runner; by default a sequence may fill the whole pool, and what the
    runner objects to is raised at once."""
    allocator = PageAllocator(num_pages, page_size, enable_prefix_caching)
    sizes = num_pages, page_size, max_rows, vocab_size, max_step_tokens
    runner = FakeRunner(*sizes, fail_rows, long_rope_len, windows)
    scheduler = Scheduler(
        allocator,
        max_rows,
        max_step_tokens,
        Stats(),
        step_sizes,
        windows=windows,
        run_ahead=run_ahead,
        long_rope_len=long_rope_len,
    )
    engine = Engine(
        scheduler,
        runner,
        max_model_len=max_model_len or allocator.num_usable // len(windows) * page_size,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        seed=seed,
        run_ahead=run_ahead,
        max_failures=max_failures,
    )
    return engine, runner


def run_to_end(engine: Engine, max_steps: int = 10_000) -> list[RequestUpdate]:
    """Steps until nothing is left, checking the books after each; all the news in order."""
    updates: list[RequestUpdate] = []
    for _ in range(max_steps):
        if not engine.has_unfinished_requests:
            return updates
        updates += engine.step()
        engine.scheduler.check_integrity()
    raise AssertionError(f"requests are left after {max_steps} steps")
