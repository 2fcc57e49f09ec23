"""Streamed replies: server-sent events, keep-alive comments, and the end of readers that stall."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import HttpVersion11, web

from jaxserve.log import logger
from server.errors import api_error
from server.generation import Delta, Run
from server.service import SERVICE

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would gather chunks
}
DONE = b"data: [DONE]\n\n"
PING = b": keep-alive\n\n"


def event(payload: Any) -> bytes:
    """One event. JSON holds no line break, so it is always a single line."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class TimedResponse:
    """A streamed reply whose client is cut off if it doesn't read for ``write_timeout_s``.

    One timer per reply watches all its writes, which costs nothing per chunk; it also sends
    ``ping`` after ``stream_ping_s`` of silence, so that proxies keep the connection.

    Raises (from ``write``):
        ConnectionError: the client is gone.
    """

    def __init__(self, request: web.Request, headers: dict[str, str], ping: bytes = b"") -> None:
        config, self._metrics = request.app[SERVICE].config, request.app[SERVICE].metrics
        self._request = request
        self._response = web.StreamResponse(headers=headers)
        self._write_timeout, self._ping_after = config.write_timeout_s, config.stream_ping_s
        self._ping = ping
        self._chunked = request.version >= HttpVersion11
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._last_write = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._pings: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        if self._chunked:
            self._response.enable_chunked_encoding()
        await self._response.prepare(self._request)
        self._metrics.streams.inc()
        self._tick()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._metrics.streams.dec()
        if self._timer is not None:
            self._timer.cancel()

    async def write(self, data: bytes) -> None:
        """Sends bytes; waits while the client's buffers are full."""
        self._writing_since = self._loop.time()
        await self._response.write(data)
        self._writing_since, self._last_write = None, self._loop.time()

    def is_free(self) -> bool:
        """Whether ``write_now`` may be used: nothing waits to be read by the client. Only after the
        first ``write``, which sends the head."""
        transport = self._request.transport
        return (
            transport is not None
            and self._writing_since is None
            and transport.get_write_buffer_size() == 0
            and not transport.is_closing()
        )

    def write_now(self, data: bytes) -> None:
        """Sends bytes without waiting, past aiohttp's writer: the system takes them at once."""
        transport = self._request.transport
        if transport is not None:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
            self._last_write = self._loop.time()

    async def end(self) -> web.StreamResponse:
        """Ends the reply."""
        self._writing_since = self._loop.time()
        await self._response.write_eof()
        self._writing_since = None
        return self._response

    def _tick(self) -> None:
        """Runs a few times per timeout, so a stalled client lives at most a quarter longer."""
        now = self._loop.time()
        transport = self._request.transport
        if self._writing_since is not None and now - self._writing_since > self._write_timeout:
            if transport is not None:
                logger.info("a client did not read its stream and was cut off")
                transport.abort()
            return
        idle = self._writing_since is None and now - self._last_write >= self._ping_after
        if idle and self._ping and transport is not None and not transport.is_closing():
            task = self._loop.create_task(self._send_ping())
            self._pings.add(task)
            task.add_done_callback(self._pings.discard)
        self._timer = self._loop.call_later(
            min(self._write_timeout, self._ping_after) / 4, self._tick
        )

    async def _send_ping(self) -> None:
        with contextlib.suppress(ConnectionError):  # the handler notices it too
            await self.write(self._ping)


@dataclass(frozen=True)
class Format:
    """How news is put into bytes.

    Attributes:
        encode: one piece of news.
        done: what ends a reply.
        ping: sent after silence, see ``TimedResponse``.
    """

    headers: dict[str, str]
    encode: Callable[[Any], bytes]
    done: bytes = b""
    ping: bytes = b""


EVENTS = Format(HEADERS, event, DONE, PING)


async def respond(
    request: web.Request,
    run: Run,
    show: Callable[[Delta], Iterable[Any]],
    last: Callable[[], Iterable[Any]] = tuple,
    form: Format = EVENTS,
) -> web.StreamResponse:
    """Streams a run's news.

    The head is sent with the first piece, so that what fails before it has its own HTTP status;
    only if there is a ping and the first piece takes longer than ``stream_ping_s`` is the head sent
    without. Later failures become a piece with an error object.

    Args:
        show: JSON values for some news, none if it isn't worth telling.
        last: JSON values for the end.
    """
    pieces = _pieces(run, show, last)
    first = asyncio.ensure_future(anext(pieces))
    try:
        silence_s = request.app[SERVICE].config.stream_ping_s if form.ping else None
        await asyncio.wait({first}, timeout=silence_s)
        if first.done() and first.exception() is not None:
            first.result()
        async with TimedResponse(request, form.headers, form.ping) as response:

            def pass_on(delta: Delta) -> None:
                for piece in show(delta):
                    response.write_now(form.encode(piece))

            try:
                await response.write(form.encode(await first))
                run.divert(pass_on, response.is_free)
                async for piece in pieces:
                    await response.write(form.encode(piece))
            except ConnectionError:
                raise
            except Exception as error:
                await response.write(form.encode(api_error(error).body()))
            if form.done:
                await response.write(form.done)
            return await response.end()
    finally:
        first.cancel()


async def _pieces(
    run: Run, show: Callable[[Delta], Iterable[Any]], last: Callable[[], Iterable[Any]]
) -> AsyncIterator[Any]:
    async for delta in run:
        for piece in show(delta):
            yield piece
    for piece in last():
        yield piece
