"""The engine as the front-end sees it: submit a request, read its tokens as they come. No JAX."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve import log
from jaxserve.engine.admission import Limits
from jaxserve.errors import InvalidRequestError, JaxserveError, RequestFailedError
from jaxserve.sampling.params import SamplingParams
from server import wire
from server.engine_info import (
    EngineDeadError,
    EngineInfo,
    OverloadedError,
    QueueTimeoutError,
    Startup,
    State,
)
from server.engine_messages import EngineLine, SilenceError
from server.engine_stream import EngineStream, TokenEvent
from server.engine_supervisor import EngineProcess

RECONNECT_S = 0.05
MAX_RETRY_AFTER_S = 60.0
NO_ERROR = (None, None, None)
FRONT_END_ONLY = ("n", "stop", "bad_words", "truncate_prompt_tokens")
"""Sampling parameters that the front-end has dealt with, and the engine does not need."""
NEUTRAL = {k: v for k, v in vars(SamplingParams()).items() if k not in FRONT_END_ONLY}
"""The others, which travel only where they differ from these."""


class EngineClient:
    """One front-end's connection to the engine.

    Args:
        engine: the process, to be started and ended by this client; or the path of the socket of
            one that somebody else takes care of.
        max_queue: most requests that wait for the engine beyond those that it runs at once.
        queue_timeout_s: longest wait in that queue.

    Attributes:
        info: of the engine; None before it was ready for the first time.
        startup: how far it is.
        state: "starting", "ready", "draining" (no new requests), "dead" or "closed".
        last_heartbeat: when the engine's loop last made progress or had nothing to do, in seconds
            of ``time.monotonic``.
        num_running, num_waiting: requests of all front-ends, as of the last heartbeat.
        compiling: whether a step waited for a program to be compiled then.
    """

    def __init__(
        self,
        engine: EngineProcess | Path,
        *,
        max_queue: int = 1024,
        queue_timeout_s: float = 120.0,
    ) -> None:
        self.info: EngineInfo | None = None
        self.startup = Startup("process", 0, 0, None)
        self.state: State = "starting"
        self.last_heartbeat = time.monotonic()
        self.num_running = self.num_waiting = 0
        self.compiling = False
        self._process = engine if isinstance(engine, EngineProcess) else None
        self._path = engine.socket_path if isinstance(engine, EngineProcess) else engine
        self._max_queue = max_queue
        self._queue_timeout_s = queue_timeout_s
        self._ids = map(str, itertools.count())
        self._streams: dict[str, EngineStream] = {}
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._num_embedding = 0  # of the calls
        self._ended: deque[float] = deque(maxlen=64)  # when the last requests ended
        self._line: EngineLine | None = None
        self._connection: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Starts the process if it is ours, and connects to it; doesn't wait until it is ready."""
        if self._process is not None:
            await self._process.start()
        self._connection = asyncio.create_task(self._stay_connected())

    async def failed(self) -> str:
        """Waits until our process is dead for good; says why (see ``EngineProcess.failed``)."""
        assert self._process is not None, "somebody else takes care of the process"
        return await self._process.failed()

    async def close(self, drain_s: float = 0) -> None:
        """Takes no more requests, gives those that run so many seconds to end, and aborts the rest.
        Ends the process if it is ours. Safe to call twice."""
        if self.state == "closed":
            return
        self.state = "draining"
        if self._streams or self._num_embedding:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._idle.wait()
        if self._connection is not None:
            self._connection.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._connection
        self._fail_all("abort", "The server is shutting down.")
        if self._process is not None:
            await self._process.stop()
        self.state = "closed"

    # --- requests -------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        interval: int = 1,
    ) -> EngineStream:
        """Begins one generation (``params.n`` is the caller's business); returns its events, of so
        many tokens (see EngineStream). Requests with lower priorities get their turn first and lose
        it last.

        Raises:
            InvalidRequestError: it could not be served, now or ever.
            OverloadedError: the queue is full.
            EngineDeadError: the engine takes no requests now.
        """
        limits = self._limits()
        limits.check_prompt(prompt_token_ids)
        limits.check_params(params)
        given = {
            name: value
            for name, neutral in NEUTRAL.items()
            if (value := getattr(params, name)) != neutral
        }
        key, prompt = next(self._ids), list(prompt_token_ids)
        timeout_s = self._queue_timeout_s
        self._send(wire.Submit(key, prompt, given, cache_salt, priority, timeout_s))
        stream = EngineStream(request_id, lambda: self._abort(key), interval)
        self._streams[key] = stream
        return stream

    async def embed(
        self, request_id: str, prompt_token_ids: list[int], pooling: str
    ) -> list[float]:
        """One vector for a prompt.

        Raises:
            InvalidRequestError: it could not be served, now or ever.
            OverloadedError: the queue is full.
            QueueTimeoutError: it waited in the queue for too long.
            RequestFailedError: it failed while it ran.
            EngineDeadError: the engine takes no requests now, or died.
        """
        self._limits().check_prompt(prompt_token_ids)
        prompt, timeout_s = list(prompt_token_ids), self._queue_timeout_s
        self._num_embedding += 1
        try:
            vector: list[float] = await self._call(
                lambda key: wire.Embed(key, prompt, pooling, timeout_s)
            )
        finally:
            self._num_embedding -= 1
            self._note_end()
        return vector

    async def stats(self) -> dict[str, Any]:
        """Stats' fields by name, and running, waiting, kv_pages_used, kv_pages_total,
        padding_waste and kv_waste.

        Raises:
            EngineDeadError: there is no engine to ask, or it died.
        """
        stats: dict[str, Any] = await self._call(wire.GetStats)
        return stats

    async def _call(self, make: Callable[[str], wire.Message]) -> Any:
        key = next(self._ids)
        self._calls[key] = future = asyncio.get_running_loop().create_future()
        try:
            self._send(make(key))
            return await future
        finally:
            del self._calls[key]
            if not future.done() or future.cancelled():
                self._send_quietly(wire.Abort([key]))

    def _limits(self) -> Limits:
        """What requests may ask for; raises if none can be taken now."""
        if self.state != "ready" or self.info is None:
            reasons = {"starting": "starting", "dead": "being started again"}
            reason = reasons.get(self.state, "shutting down")
            raise EngineDeadError(f"The engine is {reason}; try again later.")
        num_requests = len(self._streams) + len(self._calls)
        if num_requests >= self.info.max_num_seqs + self._max_queue:
            message = f"{num_requests} requests are running or waiting; try again later."
            raise OverloadedError(message, self._retry_after())
        return self.info.limits

    def _abort(self, key: str) -> None:
        """Called by a stream that nobody reads any more."""
        if self._remove(key) is not None:
            self._send_quietly(wire.Abort([key]))

    def _remove(self, key: str) -> EngineStream | None:
        stream = self._streams.pop(key, None)
        if stream is not None:
            self._note_end()
        return stream

    def _note_end(self) -> None:
        """Of a generation or an embedding."""
        self._ended.append(time.monotonic())
        if not (self._streams or self._num_embedding):
            self._idle.set()

    def _retry_after(self) -> float:
        """Seconds in which as many requests may end as wait now, by the pace of the last ones."""
        if len(self._ended) < 2:
            return 1.0
        pace = (time.monotonic() - self._ended[0]) / len(self._ended)
        return min(max(1.0, pace * self.num_waiting), MAX_RETRY_AFTER_S)

    # --- the connection -------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        while True:
            try:
                self._line = await EngineLine.open(self._path, self._take)
            except OSError:  # it isn't there (again) yet
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                await self._line.hear()
            except (OSError, wire.WireError) as error:
                if isinstance(error, SilenceError) and self.state != "dead":
                    log.logger.error("the engine's process does not answer: %s.", error)
                if self.state != "draining":
                    self.state = "dead"
                self._fail_all("error", "The engine has failed.")
            finally:
                self._line = None

    def _send(self, message: wire.Message) -> None:
        if self._line is None:
            raise EngineDeadError("The engine is being started; try again later.")
        try:
            frame = wire.encode(message)
        except wire.WireError as error:
            raise InvalidRequestError(f"The request can't be passed on: {error}.") from error
        self._line.send(frame)

    def _send_quietly(self, message: wire.Message) -> None:
        with contextlib.suppress(EngineDeadError):
            self._send(message)

    def _take(self, message: wire.Message) -> None:
        """Takes in what the engine says."""
        if isinstance(message, wire.Events):
            streams = self._streams
            for key, token_ids in message.tokens.items():
                if (stream := streams.get(key)) is not None:  # else it was aborted meanwhile
                    stream.put_tokens(token_ids)
            for fields in message.events:
                self._take_event(fields)
        elif isinstance(message, wire.Heartbeat):
            self.last_heartbeat = time.monotonic() - message.stalled_s
            self.num_running, self.num_waiting = message.num_running, message.num_waiting
            self.compiling = message.compiling
        elif isinstance(message, wire.Reply):
            self._take_reply(message)
        elif isinstance(message, wire.Starting):
            self._become("starting")
            self.startup = Startup(message.stage, message.done, message.total, message.eta_s)
        elif isinstance(message, wire.Ready):
            eos = tuple(message.info["eos_token_ids"])
            self.info = EngineInfo(**message.info | {"eos_token_ids": eos})
            self.startup = Startup("ready", 1, 1, 0.0)
            self._become("ready")
        else:
            raise wire.WireError(f"the engine sent a {type(message).__name__}")

    def _become(self, state: State) -> None:
        self.last_heartbeat = time.monotonic()
        if self.state != "draining":
            self.state = state

    def _take_reply(self, message: wire.Reply) -> None:
        future = self._calls.get(message.request_id)
        if future is None or future.done():
            return
        if message.error is None:
            future.set_result(message.value)
        else:
            future.set_exception(self._error(*message.error))

    def _take_event(self, fields: Any) -> None:
        """Hands on a ``wire.Event``'s fields."""
        try:
            key, token_ids, logprobs, reason, stop_reason, num_cached, of_prompt, error = fields
            stream = self._streams.get(key)
            if stream is None:
                return  # it was aborted meanwhile
            if logprobs is not None:
                logprobs = wire.logprobs(logprobs)
            if of_prompt is not None:
                of_prompt = wire.logprobs(of_prompt)
            kind, text, param = error or NO_ERROR
        except (TypeError, ValueError) as fault:
            raise wire.WireError("an event of another form") from fault
        if reason is not None:
            self._remove(key)
        if kind in (wire.INVALID, wire.OVERLOADED):
            stream.fail(self._error(kind, text, param))
        else:
            event = token_ids, logprobs, reason, stop_reason, num_cached, of_prompt, text
            stream.put(TokenEvent(*event))

    def _error(self, kind: str, text: Any, param: Any) -> JaxserveError:
        """The exception for an error that the engine reports."""
        if kind == wire.INVALID:
            return InvalidRequestError(text, param)
        if kind == wire.OVERLOADED:
            return QueueTimeoutError(text, self._retry_after())
        return RequestFailedError(text)

    def _fail_all(self, finish_reason: str, error: str) -> None:
        """Ends all streams and calls."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(TokenEvent([], finish_reason=finish_reason, error=error))
        self._idle.set()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(error))
