"""Decides which request gets how many tokens in the next step. No JAX.

There is no prefill or decode phase: every request has tokens that are not computed yet, and each
step hands its token budget to requests in order of arrival. A prompt longer than what is left is
cut into chunks; a request that decodes has just one token to compute.

The scheduler runs ahead of the device: it decides step n + 1 before it knows which tokens
step n chose. What it must know, lengths, it knows; a request that turns out to have ended with step
n computes one surplus token in step n + 1, which ``update`` throws away.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from jaxserve.engine.page_allocator import PageAllocator, page_hash
from jaxserve.engine.request import (
    Decision,
    FinishReason,
    Request,
    RequestUpdate,
    SampledToken,
    ScheduledRequest,
    Status,
)
from jaxserve.engine.stats import Stats


class Scheduler:
    """Owns the queues, the rows and the page allocator.

    Args:
        allocator: the pages.
        max_rows: most requests that run at once.
        max_step_tokens: most tokens that a step computes.
        stats: counters to keep.
    """

    def __init__(
        self, allocator: PageAllocator, max_rows: int, max_step_tokens: int, stats: Stats
    ) -> None:
        self.allocator = allocator
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.stats = stats
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_rows = list(range(max_rows))

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """Ends a request at once, wherever it is; None if it isn't there (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, reason)
        return request

    def schedule(self) -> Decision:
        """Decides the next step; an empty decision if nothing can be computed now."""
        scheduled: list[ScheduledRequest] = []
        budget, page_size = self.max_step_tokens, self.allocator.page_size
        for request in self.running.copy():
            tokens = min(request.num_schedulable_tokens, budget)
            if tokens == 0 or request.status is not Status.RUNNING:
                continue
            first_new_page = len(request.pages)
            room = first_new_page * page_size - request.num_computed_tokens
            if tokens > room and not self._extend_pages(request, tokens):
                continue
            scheduled.append(self._schedule_one(request, tokens, first_new_page, new_row=False))
            budget -= tokens
        while self.waiting and budget > 0 and self._free_rows:
            request = self.waiting[0]
            if request.num_pending or not self._admit(request):
                break  # first come, first served: nobody overtakes
            tokens = min(request.num_schedulable_tokens, budget)
            scheduled.append(self._schedule_one(request, tokens, 0, new_row=True))
            budget -= tokens
        return Decision(tuple(scheduled))

    def update(
        self, decision: Decision, sampled: Sequence[SampledToken | None]
    ) -> list[RequestUpdate]:
        """Takes in what a completed step chose, one entry per scheduled request.

        Entries of requests that ended meanwhile are surplus and are dropped here.
        """
        updates = []
        caching = self.allocator.enable_prefix_caching
        for item, token in zip(decision.scheduled, sampled, strict=True):
            request = item.request
            if request.status is Status.FINISHED:
                continue
            reason = None
            if token is not None:
                update = self._append(request, token)
                updates.append(update)
                reason = update.finish_reason
            if reason is FinishReason.ERROR:
                self.allocator.forget(request.page_hashes)
            elif caching and request.num_preemptions == item.num_preemptions:
                self._register_pages(item)
            if reason is not None:
                self._finish(request, reason)
        return updates

    def check_integrity(self) -> None:
        """Checks that no page and no row is lost or owned twice.

        Raises:
            RuntimeError: one is.
        """
        self.allocator.check_integrity(request.pages for request in self.requests.values())
        rows = sorted([r.row for r in self.running] + self._free_rows)
        if rows != list(range(self.max_rows)):
            raise RuntimeError(f"rows are lost or owned twice: {rows}")
        if len(self.requests) != len(self.waiting) + len(self.running):
            raise RuntimeError("a request is in no queue, or in two")

    # --- one request ------------------------------------------------------------------------

    def _admit(self, request: Request) -> bool:
        """Gives a waiting request a row and the pages of all its tokens, if there are enough.

        One free page per running request must remain, else the next page that one of them needs
        would preempt this request right away.
        """
        hits = self.allocator.match(self._hashes(request, request.num_tokens - 1))
        missing = self.allocator.pages_for(request.num_tokens) - len(hits)
        free = self.allocator.num_free_after_taking(hits)
        if free < missing + len(self.running):
            return False
        self.waiting.popleft()
        self.allocator.take(hits)
        request.pages = hits + self.allocator.allocate(missing)
        request.num_computed_tokens = len(hits) * self.allocator.page_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.stats.prompt_tokens += request.num_prompt_tokens
            self.stats.cached_tokens += request.num_cached_tokens
        request.row = heapq.heappop(self._free_rows)
        request.status = Status.RUNNING
        self.running.append(request)
        return True

    def _extend_pages(self, request: Request, tokens: int) -> bool:
        """Makes room for more tokens, preempting the youngest; False if that was the request."""
        goal = self.allocator.pages_for(request.num_computed_tokens + tokens)
        needed = goal - len(request.pages)
        while needed > self.allocator.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if needed > 0:
            request.pages += self.allocator.allocate(needed)
        return True

    def _schedule_one(
        self, request: Request, tokens: int, first_new_page: int, new_row: bool
    ) -> ScheduledRequest:
        start, total = request.num_computed_tokens, request.num_tokens
        samples = start + tokens == total
        new_pages = request.pages[first_new_page:]
        item = ScheduledRequest(
            request,
            request.row,
            start,
            tokens,
            samples,
            total - request.num_prompt_tokens,
            new_row,
            first_new_page,
            tuple(new_pages) if new_pages else (),
            request.num_preemptions,
        )
        request.num_computed_tokens = start + tokens
        request.num_pending += samples
        return item

    def _append(self, request: Request, token: SampledToken) -> RequestUpdate:
        """Adds a token to a request and says whether it ends with it."""
        token_id, logprobs = token
        request.num_pending -= 1
        if token_id < 0:
            return RequestUpdate(request, None, None, FinishReason.ERROR)
        request.token_ids.append(token_id)
        self.stats.generation_tokens += 1
        reason = None
        outputs = len(request.token_ids) - request.num_prompt_tokens
        if token_id in request.stop_token_ids and outputs >= request.params.min_tokens:
            request.stop_reason = token_id
            reason = FinishReason.STOP
        elif outputs >= request.max_tokens:
            reason = FinishReason.LENGTH
        return RequestUpdate(request, token_id, logprobs, reason)

    def _register_pages(self, item: ScheduledRequest) -> None:
        """Makes the pages findable that a completed step filled to the end."""
        size, request = self.allocator.page_size, item.request
        end = item.start + item.num_scheduled_tokens
        first, last = item.start // size, end // size
        if first < last:
            hashes = self._hashes(request, end)
            for page, hash_ in zip(request.pages[first:last], hashes[first:last]):
                self.allocator.register(page, hash_)

    def _hashes(self, request: Request, num_tokens: int) -> list[bytes]:
        """Hashes of the full pages within the first ``num_tokens`` tokens."""
        if not self.allocator.enable_prefix_caching:
            return []
        size, hashes = self.allocator.page_size, request.page_hashes
        for index in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else request.cache_salt
            tokens = request.token_ids[index * size : (index + 1) * size]
            hashes.append(page_hash(parent, tokens))
        return hashes[: num_tokens // size]

    def _preempt(self, request: Request) -> None:
        """Takes a running request's pages and row away; it is computed anew later."""
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.allocator.free(request.pages)
        request.pages = []
        heapq.heappush(self._free_rows, request.row)
        request.row = -1

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]
        self.stats.finished[str(reason)] = self.stats.finished.get(str(reason), 0) + 1
