"""Decides which request gets how many tokens in the next step. No JAX.

There is no prefill or decode phase: every request has tokens that are not computed yet, and each
step hands its token budget to requests in order of admission. A prompt longer than what is left is
cut into chunks; a request that decodes has just one token to compute. The budget is chosen so that
steps are well filled; those that decode come first, since only the youngest has an unfinished
prompt.

The scheduler runs ahead of the device: it decides step n + 1 before it knows which tokens
step n chose. What it must know, lengths, it knows; a request that turns out to have ended with step
n computes one surplus token in step n + 1, which ``update`` throws away.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from jaxserve.engine.decision import Decision, StepResult
from jaxserve.engine.page_allocator import PageAllocator
from jaxserve.engine.page_tables import Cells, PageTables, flat, held
from jaxserve.engine.request import FinishReason, Request, RequestUpdate, Status
from jaxserve.engine.running import Running
from jaxserve.engine.stats import Stats
from jaxserve.engine.step_size import StepFiller
from jaxserve.engine.waiting import Waiting


class Scheduler:
    """Owns the queues, the rows and the page allocator.

    Args:
        allocator: the pages.
        max_rows: most requests that run at once.
        max_step_tokens: most tokens that a step computes.
        stats: counters to keep.
        step_sizes: see StepFiller.
        windows: of the model's page tables, see PageTables.
        run_ahead: most steps under way when the next is decided.
        long_rope_len: a request longer than this has all its keys rotated by other frequencies (see
            ``ModelConfig.long_rope_len``), so one that grows beyond it is computed anew, once;
            None if never.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        max_rows: int,
        max_step_tokens: int,
        stats: Stats,
        step_sizes: Sequence[int] = (),
        windows: Sequence[int | None] = (None,),
        run_ahead: int = 2,
        long_rope_len: int | None = None,
    ) -> None:
        self.allocator = allocator
        ahead = (run_ahead + 1) * max_step_tokens
        self.tables = PageTables(allocator, windows, max_rows, ahead, long_rope_len)
        self.max_step_tokens = max_step_tokens
        self._filler = StepFiller(step_sizes)
        self._long_rope_len = long_rope_len
        self.stats = stats
        self.requests: dict[str, Request] = {}
        self.waiting = Waiting()
        self.running = Running(max_rows)

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """Ends a request at once, wherever it is; None if it isn't there (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, reason)
        return request

    def schedule(self) -> Decision:
        """Decides the next step; an empty decision if nothing can be computed now."""
        if self._long_rope_len is not None:
            self._preempt_outgrown(self._long_rope_len)
        running, cells = self.running, Cells()
        wanted = running.columns.num_schedulable_tokens()
        budget = self._budget(wanted)
        num_tokens = _grant(wanted, budget)
        num_tokens, new = self._extend_pages(num_tokens, cells), list[int]()
        budget -= int(num_tokens.sum())
        while budget > 0 and (length := self._admit_next(cells, budget)):
            new.append(min(length, budget))
            budget -= new[-1]
        if new:
            num_tokens = np.concatenate([num_tokens, np.array(new, np.int32)])
        return self._decide(num_tokens, len(new), cells)

    def update(self, decision: Decision, result: StepResult) -> list[RequestUpdate]:
        """Takes in what a completed step chose.

        Tokens of requests that ended meanwhile are surplus and are dropped here.
        """
        if self.allocator.enable_prefix_caching:
            self.tables.register(decision)
        if self.tables.has_windows:
            self.tables.free_unseen(decision)
        for request, read in result.prompt_reads:
            request.take(read)
        updates, num_generated = [], 0
        lanes = zip(
            *(decision.requests, decision.samples.tolist(), decision.ends.tolist()),
            *(result.token_ids, result.logprobs or [None] * decision.num_lanes),
            strict=True,
        )
        for request, samples, ends, token_id, logprobs in lanes:
            if not samples or request.finish_reason is not None:
                continue
            if request.num_pending:
                request.num_pending -= 1
            if token_id < 0:
                self.tables.forget(request)
                updates.append(RequestUpdate(request, None, None, FinishReason.ERROR))
                self._finish(request, FinishReason.ERROR)
                continue
            if request.pooling is not None:
                embedding = request.embedding
                updates.append(
                    RequestUpdate(request, None, None, FinishReason.STOP, embedding=embedding)
                )
                self._finish(request, FinishReason.STOP)
                continue
            num_generated += 1
            request.token_ids.append(token_id)
            reason = None
            if token_id in request.stop_token_ids and _may_stop(request):
                request.stop_reason, reason = token_id, FinishReason.STOP
            elif ends:
                reason = FinishReason.LENGTH
            update = RequestUpdate(request, token_id, logprobs, reason)
            if request.params.prompt_logprobs is not None and _is_first_token(request):
                update.prompt_logprobs = request.prompt_logprobs
            updates.append(update)
            if reason is not None:
                self._finish(request, reason)
        self.stats.generation_tokens += num_generated
        return updates

    def restart(self) -> None:
        """Takes note that the device forgot everything and that no step is under way any more: what
        ran waits again, first in line, with the tokens that are known."""
        while self.running.requests:
            self._preempt(self.running.requests[-1])
        for request in self.waiting:
            request.num_pending = 0
        self.allocator.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Checks that no page and no row is lost or owned twice.

        Raises:
            RuntimeError: one is.
        """
        self.allocator.check_integrity(flat(one.pages) for one in self.requests.values())
        self.running.check_integrity()
        if len(self.requests) != len(self.waiting) + len(self.running):
            raise RuntimeError("a request is in no queue, or in two")

    # --- deciding ---------------------------------------------------------------------------

    def _preempt_outgrown(self, limit: int) -> None:
        """Preempts who was admitted with at most ``limit`` tokens and has to compute the next. It
        waits first in line, for a row and for its tokens that steps under way will bring."""
        columns = self.running.columns
        reached = (columns.num_given_tokens <= limit) & (columns.num_computed_tokens >= limit)
        outgrown = reached & (columns.num_schedulable_tokens() > 0)
        for index in outgrown.nonzero()[0][::-1].tolist():
            self._preempt(self.running.requests[index])

    def _budget(self, wanted: np.ndarray) -> int:
        """How many tokens the step gets if those that run want so many, int32 [running]."""
        num_lanes, num_running = int(np.count_nonzero(wanted)), int(wanted.sum())
        num_tokens = num_running + self._num_waiting_tokens(self.max_step_tokens - num_running)
        queue = len(self.waiting) > self.running.num_free_rows
        num_tokens = min(num_tokens, self.max_step_tokens)
        return self._filler.budget(num_lanes, num_running, num_tokens, queue)

    def _num_waiting_tokens(self, enough: int) -> int:
        """Tokens of the requests that can be admitted now, counted no further than ``enough``. May
        be too many, since hits among the free pages count as free, but not too few."""
        total, spare = 0, self.allocator.num_free - self._num_spoken_for()
        for request in itertools.islice(self.waiting, self.running.num_free_rows):
            num_tokens, hits = len(request.token_ids), self.tables.hits(request)
            missing = self.tables.most_pages(num_tokens) - held(hits)
            if total >= enough or spare < missing or request.num_pending:
                break
            total += num_tokens - len(hits[0]) * self.allocator.page_size
            spare -= missing + self.tables.num_tables
        return total

    def _num_spoken_for(self) -> int:
        """Free pages that the requests that run will want: a column for each, so that the next one
        of them that needs it preempts nobody, and what their prompts still lack."""
        computed = self.running.columns.num_computed_tokens
        promised = self.tables.promised(self.running.requests, computed)
        return promised + len(self.running) * self.tables.num_tables

    def _admit_next(self, cells: Cells, budget: int) -> int:
        """Gives the first waiting request a row and its pages, if there are enough for all of its
        tokens; returns how many of those it has to compute, 0 if it must wait on.

        First come, first served: nobody overtakes it.
        """
        request = next(iter(self.waiting), None)
        if request is None or request.num_pending or not self.running.num_free_rows:
            return 0
        num_tokens, page_size = len(request.token_ids), self.allocator.page_size
        hits = self.tables.hits(request)
        missing = self.tables.most_pages(num_tokens) - held(hits)
        if self.allocator.num_free_after_taking(flat(hits)) < missing + self._num_spoken_for():
            return 0
        self.waiting.remove(request)
        num_computed = len(hits[0]) * page_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_computed
            self.stats.prompt_tokens += request.num_prompt_tokens
            self.stats.cached_tokens += num_computed
        self.running.add(request, num_computed)
        cells += self.tables.take(request, hits)
        # Where pages are given back on the way, it gets them on the way too.
        goal = min(num_tokens, num_computed + budget) if self.tables.has_windows else num_tokens
        self._extend(len(self.running) - 1, self.allocator.pages_for(goal) - len(hits[0]), cells)
        return num_tokens - num_computed

    def _extend_pages(self, num_tokens: np.ndarray, cells: Cells) -> np.ndarray:
        """Makes room for so many tokens more of each request that runs, int32 [running]. Where
        pages are short, preempts the youngest of those with the worst priority.

        Returns:
            The tokens of those that still run.
        """
        columns, allocator = self.running.columns, self.allocator
        goal = columns.num_computed_tokens + num_tokens
        needed = -(-np.maximum(goal - columns.num_slots, 0) // allocator.page_size)
        while int(needed.sum()) * self.tables.num_tables > allocator.num_free:
            requests = self.running.requests
            last = max(range(len(requests)), key=lambda index: (requests[index].priority, index))
            self._preempt(requests[last])
            needed, num_tokens = np.delete(needed, last), np.delete(num_tokens, last)
        for index in needed.nonzero()[0].tolist():
            self._extend(index, int(needed[index]), cells)
        return num_tokens

    def _extend(self, index: int, count: int, cells: Cells) -> None:
        """Gives a running request so many columns more."""
        request = self.running.requests[index]
        cells += self.tables.extend(request, count)
        slots = self.tables.num_columns(request) * self.allocator.page_size
        self.running.columns.num_slots[index] = slots

    def _decide(self, num_tokens: np.ndarray, num_new_rows: int, cells: Cells) -> Decision:
        """The decision that gives each request that runs so many tokens, int32 [running]."""
        running = self.running
        lanes = num_tokens.nonzero()[0]
        requests = list(itertools.compress(running.requests, num_tokens.tolist()))
        columns, num_tokens = running.select(lanes), num_tokens[lanes]
        start = columns.num_computed_tokens
        samples = start + num_tokens == columns.num_tokens
        running.columns.num_computed_tokens[lanes] += num_tokens
        running.columns.num_tokens[lanes] += samples
        # Preempted at the limit, a request that outgrew it was admitted with more tokens than that.
        by_prompt = self._long_rope_len is None
        if requests:
            self.stats.kv_slots += int(running.columns.num_slots.sum())
            self.stats.kv_tokens += int(running.columns.num_computed_tokens.sum())
        return Decision(
            requests,
            num_new_rows,
            row=columns.row,
            start=start,
            num_scheduled_tokens=num_tokens,
            num_prompt_tokens=columns.num_prompt_tokens,
            rope_length=columns.num_prompt_tokens if by_prompt else columns.num_given_tokens,
            num_preemptions=columns.num_preemptions,
            output_index=columns.num_tokens - columns.num_prompt_tokens,
            samples=samples,
            ends=samples & (columns.num_tokens + 1 == columns.max_num_tokens),
            token_ids=_token_ids(requests, start, num_tokens, columns.num_given_tokens),
            table_updates=np.array(cells, np.int32).reshape(-1, 3),
        )

    # --- one request ------------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Takes a running request's pages and row away; it is computed anew later."""
        request.num_pending = self._release(request)
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.waiting.put_back(request)
        self.stats.preemptions += 1

    def _release(self, request: Request) -> int:
        """Takes the pages and the row away; returns how many tokens are still to come."""
        self.tables.release(request)
        return self.running.remove(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]
        self.stats.finished[str(reason)] = self.stats.finished.get(str(reason), 0) + 1


def _grant(wanted: np.ndarray, budget: int) -> np.ndarray:
    """Hands out a budget in order, int32 [n]: what each wants, as long as it lasts."""
    before = wanted.cumsum(dtype=np.int32) - wanted
    return np.minimum(wanted, np.maximum(budget - before, 0))


def _is_first_token(request: Request) -> bool:
    return len(request.token_ids) == request.num_prompt_tokens + 1


def _may_stop(request: Request) -> bool:
    """Whether its output is long enough to end at a stop token."""
    return len(request.token_ids) - request.num_prompt_tokens >= request.params.min_tokens


def _token_ids(
    requests: list[Request], start: np.ndarray, num_tokens: np.ndarray, num_given: np.ndarray
) -> np.ndarray:
    """The scheduled tokens' ids, lane after lane; -1 for those that were sampled in the row."""
    ends = num_tokens.cumsum()
    token_ids = np.full(num_tokens.sum(), -1, np.int32)
    for lane in (start < num_given).nonzero()[0].tolist():
        known = requests[lane].token_ids[start[lane] : start[lane] + num_tokens[lane]]
        token_ids[ends[lane] - num_tokens[lane] : ends[lane]] = known
    return token_ids
