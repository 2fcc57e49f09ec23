"""From the engine's tokens to text: the completions of one request while they grow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from jaxserve.engine.request import FinishReason
from jaxserve.errors import RequestFailedError
from jaxserve.outputs import Generation, Logprob, completion_params
from jaxserve.sampling.params import SamplingParams
from server.engine_client import EngineStream, TokenEvent
from server.errors import ApiError, unavailable
from server.protocol.sampling import Options
from server.service import Prompt, Service

TokenLogprobs = dict[int, Logprob]


def check(event: TokenEvent) -> TokenEvent:
    """The event, unless it tells of a failure.

    Raises:
        RequestFailedError: the engine gave the request up.
        ApiError: the engine aborted it, because the server shuts down.
    """
    if event.finish_reason == FinishReason.ERROR:
        raise RequestFailedError(event.error or "The generation failed.")
    if event.finish_reason == FinishReason.ABORT:
        raise unavailable("The server ended this request before it was done.", "aborted")
    return event


@dataclass(slots=True)
class Delta:
    """What one event of the engine added to a completion; or all of it.

    Attributes:
        logprobs: of its tokens, if they were asked for.
        finish_reason, stop_reason: why the completion ended, if this ended it.
    """

    completion: Completion
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Completion:
    """One completion of one prompt.

    Attributes:
        number: among those of the request, see ``Run``.
        output: its text and tokens so far, see CompletionOutput.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        prompt_logprobs: per prompt token, None for the first, if asked for.
    """

    def __init__(self, number: int, prompt: Prompt, generation: Generation) -> None:
        self.number = number
        self.prompt = prompt
        self.output = generation.output
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.first_event_at: float | None = None
        self.last_event_at = 0.0
        self._generation = generation

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; by it the best of several are chosen."""
        return (self.output.cumulative_logprob or 0.0) / max(len(self.output.token_ids), 1)

    def take(self, event: TokenEvent) -> Delta:
        """Adds an event's tokens; a stop string may end the completion among them. Raises what
        ``check`` raises."""
        check(event)
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *map(self._generation.shown, event.prompt_logprobs)]
        output, append, text = self.output, self._generation.append, ""
        start, last = len(output.token_ids), len(event.token_ids) - 1
        for place, token_id in enumerate(event.token_ids):
            logprobs = None if event.logprobs is None else event.logprobs[place]
            stops = place == last and event.finish_reason == FinishReason.STOP
            text += append(token_id, logprobs, stops)
            if output.finish_reason is not None:
                break  # a stop string: what follows is surplus
        if event.finish_reason is not None and output.finish_reason is None:
            reason = FinishReason(event.finish_reason)
            text += self._generation.finish(reason, event.stop_reason)
        return self._delta(text, start)

    def whole(self) -> Delta:
        """All that came so far."""
        return self._delta(self.output.text, 0)

    def _delta(self, text: str, start: int) -> Delta:
        """The output from a place among its tokens on."""
        output = self.output
        logprobs = None if output.logprobs is None else output.logprobs[start:]
        ids, reason, stop = output.token_ids[start:], output.finish_reason, output.stop_reason
        return Delta(self, text, ids, logprobs, reason, stop)


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
        self._request_id = request_id
        self._arrived = time.monotonic()
        self._stack = AsyncExitStack()
        self._streams: list[EngineStream] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        most, count = self._service.config.max_queue, len(self.prompts) * self.options.best_of
        if count > most:
            message = f"{count} completions in one request are more than the queue's {most}."
            raise ApiError(400, message, param="n")
        async with AsyncExitStack() as stack:
            for number in range(count):
                prompt = self.prompts[number // self.options.best_of]
                await self._submit(stack, number, prompt)
                await asyncio.sleep(0)  # handing over a long prompt takes a moment
            self._stack = stack.pop_all()
        self._service.under_way += 1
        self._service.metrics.n.observe(self.options.n)
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
        await self._stack.aclose()
        for completion in self.completions:
            if completion.output.finish_reason is None:
                failed = isinstance(error, Exception)
                self._service.metrics.request_finished("error" if failed else "abort")

    async def _submit(self, stack: AsyncExitStack, number: int, prompt: Prompt) -> None:
        params = completion_params(self.options.params, number % self.options.best_of)
        stream = self._service.engine.submit(
            f"{self._request_id}-{number}",
            prompt.token_ids,
            params,
            cache_salt=self.options.cache_salt,
            priority=self.options.priority,
        )
        self._streams.append(await stack.enter_async_context(stream))
        self._add(number, prompt, params)

    def _add(self, number: int, prompt: Prompt, params: SamplingParams) -> None:
        """A completion that has begun."""
        tokenizer, eos = self._service.texts.tokenizer, self._service.info().eos_token_ids
        generation = Generation(params, prompt.token_ids, number, tokenizer, eos)
        self.completions.append(Completion(number, prompt, generation))
        metrics = self._service.metrics
        metrics.prompt_tokens.observe(len(prompt.token_ids))
        if params.max_tokens is not None:
            metrics.max_tokens.observe(params.max_tokens)

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
        self._measure(delta)
        if delta.finish_reason is not None:
            stream.abort()  # after a stop string the engine doesn't know that it is over
        return delta

    def _measure(self, delta: Delta) -> None:
        metrics, completion, now = self._service.metrics, delta.completion, time.monotonic()
        output = completion.output
        if completion.first_event_at is None:
            metrics.ttft.observe(now - self._arrived)
            completion.first_event_at = now
        elif delta.token_ids:
            count = len(delta.token_ids)
            metrics.itl.observe((now - completion.last_event_at) / count, count)
        completion.last_event_at = now
        if output.finish_reason is not None:
            tokens = len(output.token_ids)
            metrics.request_finished(output.finish_reason)
            metrics.e2e.observe(now - self._arrived)
            metrics.generation_tokens.observe(tokens)
            if tokens > 1:
                metrics.tpot.observe((now - completion.first_event_at) / (tokens - 1))
