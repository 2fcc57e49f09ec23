"""Streamed replies: server-sent events, keep-alive comments, and the end of readers that stall."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import HttpVersion11, web

from jaxserve.log import logger
from server.completion import Delta
from server.errors import api_error
from server.generation import Run
from server.service import SERVICE

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would gather chunks
}
DONE = b"data: [DONE]\n\n"
PING = b": keep-alive\n\n"


_MARK = secrets.token_hex(16)
"""A text that stands nowhere else in a chunk."""


def event(payload: Any) -> bytes:
    """One event. JSON holds no line break, so it is always a single line."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class _Reply(web.StreamResponse):
    """Its head goes out with its first bytes instead of by itself."""

    _send_headers_immediately = False


class TimedResponse:
    """A streamed reply whose client is cut off if it doesn't read for ``write_timeout_s``.

    The head is sent with the first bytes. One timer per reply watches all its writes, which costs
    nothing per chunk; it also sends ``ping`` after ``stream_ping_s`` of silence, so that proxies
    keep the connection.

    Raises (from ``write`` and ``end``):
        ConnectionError: the client is gone.
    """

    def __init__(self, request: web.Request, headers: dict[str, str], ping: bytes = b"") -> None:
        config, self._metrics = request.app[SERVICE].config, request.app[SERVICE].metrics
        self._request = request
        self._response = _Reply(headers=headers)
        self._write_timeout, self._ping_after = config.write_timeout_s, config.stream_ping_s
        self._ping = ping
        self._chunked = request.version >= HttpVersion11
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._wrote, self._silent_since = False, self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._pings: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._tick()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.begun:
            self._metrics.streams.dec()
        if self._timer is not None:
            self._timer.cancel()
        for ping in self._pings:
            ping.cancel()  # it may not begin a reply that was given up

    @property
    def begun(self) -> bool:
        """Whether the head is on its way, so that no other reply can be given any more."""
        return self._response.prepared

    async def write(self, data: bytes) -> None:
        """Sends bytes; waits while the client's buffers are full."""
        self._writing_since = self._loop.time()
        await self._begin()
        await self._response.write(data)
        self._writing_since, self._wrote = None, True

    async def end(self, data: bytes) -> web.StreamResponse:
        """Sends the last bytes and ends the reply."""
        self._writing_since = self._loop.time()
        await self._begin()
        await self._response.write_eof(data)
        self._writing_since = None
        return self._response

    def is_free(self) -> bool:
        """Whether ``write_now`` may be used: the head is sent, and nothing waits to be read by the
        client."""
        transport = self._transport
        return (
            transport is not None
            and self._writing_since is None
            and transport.get_write_buffer_size() == 0
            and not transport.is_closing()
        )

    def write_now(self, data: bytes) -> None:
        """Sends bytes without waiting, past aiohttp's writer: the system takes them at once."""
        assert self._transport is not None, "only if it is free"
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self._wrote = True

    async def _begin(self) -> None:
        if self.begun:
            return
        if self._chunked:
            self._response.enable_chunked_encoding()
        self._metrics.streams.inc()
        await self._response.prepare(self._request)
        self._transport = self._request.transport

    def _tick(self) -> None:
        """Runs a few times per timeout, so a stalled client lives at most a quarter longer."""
        now = self._loop.time()
        transport = self._request.transport
        if self._writing_since is not None and now - self._writing_since > self._write_timeout:
            if transport is not None:
                logger.info("a client did not read its stream and was cut off")
                transport.abort()
            return
        if self._wrote:  # to ask for the time with each chunk would cost more
            self._wrote, self._silent_since = False, now
        idle = self._writing_since is None and now - self._silent_since >= self._ping_after
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
    brief: bool = False,
) -> web.StreamResponse:
    """Streams a run's news.

    The head is sent with the first piece, so that what fails before it has its own HTTP status;
    only if there is a ping and the first piece takes longer than ``stream_ping_s`` is the head sent
    without. Later failures become a piece with an error object. All that comes with the end is
    sent at once.

    Args:
        show: JSON values for some news, none if it isn't worth telling.
        last: JSON values for the end.
        brief: what is shown between the first news and the last differs in its text alone, and
            news without text isn't shown.
    """

    def encoded(delta: Delta) -> bytes:
        return b"".join(map(form.encode, show(delta)))

    async with TimedResponse(request, form.headers, form.ping) as response:

        def pass_on(delta: Delta) -> None:
            if data := encoded(delta):
                response.write_now(data)

        unsent = b""
        try:
            if brief:
                write = _TextWriter(run, encoded, response.write_now).write
                run.divert_text(pass_on, response.is_free, write)
            else:
                run.divert(pass_on, response.is_free)
            async for delta in run:
                unsent += encoded(delta)
                if unsent and not run.ended:
                    await response.write(unsent)
                    unsent = b""
            unsent += b"".join(map(form.encode, last()))
        except ConnectionError:
            raise
        except Exception as error:
            if not response.begun:
                raise
            unsent += form.encode(api_error(error).body())
        return await response.end(unsent + form.done)


class _TextWriter:
    """Writes chunks that differ in their text alone: what stands around it is made once."""

    def __init__(
        self, run: Run, encoded: Callable[[Delta], bytes], write: Callable[[bytes], None]
    ) -> None:
        self._run, self._encoded, self._write = run, encoded, write
        self._around: tuple[bytes, bytes] | None = None

    def write(self, text: str) -> None:
        """Sends a chunk at once."""
        if self._around is None:
            marked = Delta(self._run.completions[0], _MARK, [], None, None, None)
            before, after = self._encoded(marked).split(orjson.dumps(_MARK))
            self._around = before, after
        before, after = self._around
        self._write(before + orjson.dumps(text) + after)
