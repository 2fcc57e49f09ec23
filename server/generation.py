"""The completions of one request, from the engine's queue to their ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from jaxserve.errors import RequestFailedError
from jaxserve.outputs import Generation, completion_params
from jaxserve.sampling.params import SamplingParams
from server.completion import Completion, Delta
from server.engine_stream import EngineStream, TokenEvent
from server.errors import ApiError
from server.protocol.sampling import Options
from server.service import Prompt, Service


class Run:
    """All completions that a request asked for.

        async with Run(service, request_id, prompts, options) as run:
            async for delta in run:
                ...

    Leaving the block early aborts what still runs in the engine.

    Args:
        request_id: unique; the engine's ids are made of it.
        prompts: each gets ``options.best_of`` completions, numbered through.

    Raises (from ``async with``):
        OverloadedError, InvalidRequestError: the engine refuses.
        ApiError: more completions than the queue could ever take.
    """

    def __init__(
        self, service: Service, request_id: str, prompts: Sequence[Prompt], options: Options
    ) -> None:
        self.prompts = prompts
        self.options = options
        self.completions: list[Completion] = []
        self._service = service
        self._metrics = service.metrics
        self._request_id = request_id
        self._arrived = time.monotonic()
        self._streams: list[EngineStream] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        most, count = self._service.config.max_queue, len(self.prompts) * self.options.best_of
        if count > most:
            message = f"{count} completions in one request are more than the queue's {most}."
            raise ApiError(400, message, param="n")
        try:
            for number in range(count):
                if number:
                    await asyncio.sleep(0)  # handing over a long prompt takes a moment
                self._submit(number, self.prompts[number // self.options.best_of])
        except BaseException:
            self._abort()
            raise
        self._service.under_way += 1
        self._metrics.n.observe(self.options.n)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._service.under_way -= 1
        for pump in self._pumps:
            pump.cancel()
        self._abort()
        for completion in self.completions:
            if completion.output.finish_reason is None:
                failed = isinstance(error, Exception)
                self._metrics.request_finished("error" if failed else "abort")

    def _submit(self, number: int, prompt: Prompt) -> None:
        params = completion_params(self.options.params, number % self.options.best_of)
        stream = self._service.engine.submit(
            f"{self._request_id}-{number}",
            prompt.token_ids,
            params,
            cache_salt=self.options.cache_salt,
            priority=self.options.priority,
            interval=self.options.interval,
        )
        self._streams.append(stream)
        self._add(number, prompt, params)

    def _abort(self) -> None:
        """Ends what still runs in the engine."""
        for stream in self._streams:
            stream.abort()

    def _add(self, number: int, prompt: Prompt, params: SamplingParams) -> None:
        """A completion that has begun."""
        tokenizer, eos = self._service.texts.tokenizer, self._service.info().eos_token_ids
        generation = Generation(params, prompt.token_ids, number, tokenizer, eos)
        self.completions.append(Completion(number, prompt, generation))
        self._metrics.prompt_tokens.observe(len(prompt.token_ids))
        if params.max_tokens is not None:
            self._metrics.max_tokens.observe(params.max_tokens)

    @property
    def ended(self) -> bool:
        """Whether all completions have ended."""
        return all(one.output.finish_reason is not None for one in self.completions)

    def __aiter__(self) -> AsyncIterator[Delta]:
        pairs = list(zip(self.completions, self._streams))
        return self._follow(*pairs[0]) if len(pairs) == 1 else self._merge(pairs)

    def divert(self, take: Callable[[Delta], None], is_free: Callable[[], bool]) -> None:
        """Has news taken where it comes in, as long as ``is_free()``: to wake a task for each token
        and go through its iterators takes as long as everything else. The iterator gives what is
        left. Several completions are left to the iterator, which keeps their order."""
        if len(self._streams) != 1:
            return
        completion, stream = self.completions[0], self._streams[0]

        def pass_on(event: TokenEvent) -> bool:
            if not is_free():
                return False
            take(self._advance(completion, stream, event))
            return True

        stream.divert(pass_on)

    def divert_text(
        self,
        take: Callable[[Delta], None],
        is_free: Callable[[], bool],
        write: Callable[[str], None],
    ) -> None:
        """The same for requests that asked for nothing but text.

        Args:
            take: gets what a stop string ends.
            write: gets the text of all other news.
        """
        if len(self._streams) != 1:
            return
        completion, stream = self.completions[0], self._streams[0]
        output = completion.output

        def pass_on(token_ids: list[int]) -> bool:
            if not is_free():
                return False
            start = len(output.token_ids)
            text = completion.add(token_ids)
            self._measure(completion, len(token_ids))
            if output.finish_reason is not None:
                stream.abort()
                take(completion.since(start, text))
            elif text:
                write(text)
            return True

        stream.divert_tokens(pass_on)

    async def finish(self) -> None:
        """Waits until all completions have ended."""
        async for _ in self:
            pass

    def best(self) -> list[Completion]:
        """The n likeliest completions of each prompt; all of them if n is best_of."""
        n, best_of = self.options.n, self.options.best_of
        if n == best_of:
            return self.completions
        chosen: list[Completion] = []
        for start in range(0, len(self.completions), best_of):
            group = self.completions[start : start + best_of]
            chosen += sorted(group, key=lambda one: one.mean_logprob, reverse=True)[:n]
        return chosen

    def usage(self) -> dict[str, Any]:
        """The tokens read and generated so far."""
        prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        output = sum(len(one.output.token_ids) for one in self.completions)
        first = self.completions[:: self.options.best_of]
        cached = sum(one.num_cached_tokens or 0 for one in first)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def _follow(self, completion: Completion, stream: EngineStream) -> AsyncIterator[Delta]:
        async for event in stream:
            yield self._advance(completion, stream, event)
        if completion.output.finish_reason is None:
            raise RequestFailedError("The engine ended the generation without a reason.")

    async def _merge(
        self, pairs: Sequence[tuple[Completion, EngineStream]]
    ) -> AsyncIterator[Delta]:
        """The news of several completions in the order of their arrival."""
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(len(pairs))

        async def pump(completion: Completion, stream: EngineStream) -> None:
            try:
                async for delta in self._follow(completion, stream):
                    await queue.put(delta)
                await queue.put(None)
            except Exception as error:  # it is raised where the news is read
                await queue.put(error)

        self._pumps = [asyncio.create_task(pump(*pair)) for pair in pairs]
        left = len(pairs)
        while left:
            news = await queue.get()
            if news is None:
                left -= 1
            elif isinstance(news, Exception):
                raise news
            else:
                yield news

    def _advance(self, completion: Completion, stream: EngineStream, event: TokenEvent) -> Delta:
        delta = completion.take(event)
        self._measure(completion, len(delta.token_ids))
        if delta.finish_reason is not None:
            stream.abort()  # after a stop string the engine doesn't know that it is over
        return delta

    def _measure(self, completion: Completion, count: int) -> None:
        """Notes that so many tokens have come."""
        now = time.monotonic()
        if completion.first_event_at is None:
            self._metrics.ttft.observe(now - self._arrived)
            completion.first_event_at = now
        elif count:
            self._metrics.itl.observe((now - completion.last_event_at) / count, count)
        completion.last_event_at = now
        if completion.output.finish_reason is not None:
            self._measure_end(completion, completion.output.finish_reason, now - self._arrived)

    def _measure_end(self, completion: Completion, reason: str, seconds: float) -> None:
        metrics, tokens = self._metrics, len(completion.output.token_ids)
        metrics.request_finished(reason)
        metrics.e2e.observe(seconds)
        metrics.generation_tokens.observe(tokens)
        if tokens > 1 and completion.first_event_at is not None:
            spent = completion.last_event_at - completion.first_event_at
            metrics.tpot.observe(spent / (tokens - 1))
