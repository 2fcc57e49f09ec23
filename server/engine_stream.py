"""The events of one request, as the front-end reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.engine.request import TokenLogprobs


class TokenEvent(NamedTuple):
    """What one step brought for a request; what several did, when the reader is slow.

    Attributes:
        token_ids: the new tokens.
        logprobs: one per token; None if they weren't asked for.
        finish_reason: "stop", "length", "abort" or "error" in the last event, else None.
        stop_reason: the token id that ended it, if one did.
        num_cached_tokens: prompt tokens that the prefix cache spared, in the first event.
        prompt_logprobs: of the prompt's tokens but the first, in the first event, if asked for.
        error: what went wrong, with finish_reason "error" or "abort".
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


class EngineStream:
    """An async iterator of TokenEvents; the last one has a finish_reason.

        async with client.submit(...) as stream:
            async for event in stream: ...

    Leaving the block early aborts the request in the engine. One reader at a time; what it hasn't
    read yet is merged into one event.

    Args:
        request_id: the caller's.
        on_abort: called when the request is to be aborted.
        interval: so many tokens are news; fewer are held back until there are more, but for the
            first event and the last.
    """

    def __init__(self, request_id: str, on_abort: Callable[[], None], interval: int = 1) -> None:
        self.request_id = request_id
        self._on_abort = on_abort
        self._interval = interval
        self._held: TokenEvent | None = None
        self._unread: TokenEvent | None = None
        self._failure: Exception | None = None
        self._ended = False
        self._reader: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._take: Callable[[TokenEvent], bool] | None = None
        self._take_tokens: Callable[[list[int]], bool] | None = None

    def abort(self) -> None:
        """Ends the request at once; nothing more comes. Safe to call at any time."""
        if not self._ended:
            self._ended = True
            self._on_abort()
        # What takes events knows the request, which knows this stream: left to themselves, they and
        # all that they know would be garbage that only a collection finds.
        self._held = self._unread = self._take = self._take_tokens = None
        self._wake()

    def divert(self, take: Callable[[TokenEvent], bool]) -> None:
        """Has events taken where they come in, without waking the reader; it gets the last one,
        those that ``take`` returns False for, and the exception that it raises."""
        self._take = take

    def divert_tokens(self, take: Callable[[list[int]], bool]) -> None:
        """The same for tokens of which there is nothing else to tell; the reader gets all that
        tells more."""
        self._take_tokens = take

    async def __aenter__(self) -> EngineStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while self._unread is None:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            self._reader = self._loop.create_future()
            await self._reader
        event, self._unread = self._unread, None
        return event

    def put_tokens(self, token_ids: list[int]) -> None:
        """Takes the next event, which tells of nothing but tokens: nearly every one does."""
        if self._interval > 1:
            if self._held is None:
                self._held = TokenEvent(token_ids)
            else:
                self._held.token_ids.extend(token_ids)
            if len(self._held.token_ids) < self._interval:
                return
            token_ids, self._held = self._held.token_ids, None
        if self._take_tokens is not None and self._unread is None:
            try:
                if self._take_tokens(token_ids):
                    return
            except Exception as error:
                self._give_up(error)
                return
        self.put(TokenEvent(token_ids))

    def put(self, event: TokenEvent) -> None:
        """Takes the next event from the engine."""
        if self._held is not None:
            event, self._held = _merged(self._held, event), None
        begins, ends = event.num_cached_tokens is not None, event.finish_reason is not None
        if len(event.token_ids) < self._interval and not begins and not ends:
            self._held = event
            return
        before = self._unread
        if self._take is not None and before is None and not ends:
            try:
                if self._take(event):
                    return
            except Exception as error:
                self._give_up(error)
                return
        self._unread = event if before is None else _merged(before, event)
        self._ended = ends
        self._wake()

    def _give_up(self, error: Exception) -> None:
        """Of this request, which concerns no other one."""
        self.abort()
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the stream with an exception for its reader, behind what came before."""
        if self._held is not None:
            held, self._held = self._held, None
            self._unread = held if self._unread is None else _merged(self._unread, held)
        self._failure = error
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _merged(first: TokenEvent, then: TokenEvent) -> TokenEvent:
    """Two events as one; takes over the first's lists."""
    first.token_ids.extend(then.token_ids)
    logprobs = first.logprobs
    if logprobs is not None:
        logprobs.extend(then.logprobs or ())
    return then._replace(
        token_ids=first.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens,
    )
