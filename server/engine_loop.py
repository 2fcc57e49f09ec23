"""Serves one engine to front-ends: takes their commands, steps, sends what came of it. No JAX.

One thread steps the engine. Each connection has a thread that reads commands into a queue, and one
that sends; between them and the engine stand an inbox and an outbox, so that no step ever waits for
a front-end. One more thread sends heartbeats, and ends the process when a step hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import queue
import socket
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxserve import log
from jaxserve.engine.core import Engine
from jaxserve.engine.request import FinishReason, RequestUpdate
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling.params import SamplingParams
from server import wire
from server.engine_connection import Connection
from server.wire import Event

HEARTBEAT_S = 1.0
MAX_COMMANDS = 4096
"""Commands that wait for the engine; the readers stop reading when there are more."""
BACKSTOP_S = 30.0
"""How much later than the watchdog a hang is ended that stops all of Python's threads."""
QUEUE_CHECK_S = 0.25
"""How often the engine looks for requests that have waited too long."""


class Owner(NamedTuple):
    """Whose a request is.

    Attributes:
        connection, request_id: the front-end's, and its name for it.
        deadline: when its first step must have begun.
        embeds: whether a Reply is due instead of events.
    """

    connection: Connection
    request_id: str
    deadline: float
    embeds: bool

    def refuse(self, kind: str, message: str, param: str | None = None) -> None:
        """Tells that there will be nothing (more)."""
        error = [kind, message, param]
        if self.embeds:
            self.connection.post(wire.Reply(self.request_id, None, error))
        else:
            reason = str(FinishReason.ERROR)
            event = Event(self.request_id, [], finish_reason=reason, error=error)
            self.connection.post_events([event])


class EngineServer:
    """The engine's side of the socket.

    Args:
        socket_path: of the Unix socket to make.
        step_timeout_s: when no step completes for so long while requests run, it hangs. Compiling
            a program that the step needs doesn't count: it takes as long as at the start.
    """

    def __init__(self, socket_path: Path, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._inbox: queue.Queue[tuple[Connection, wire.Message | None]] = queue.Queue(MAX_COMMANDS)
        self._connections: list[Connection] = []
        self._greeting: wire.Starting | wire.Ready = wire.Starting("process", 0, 0, None)
        self._lock = threading.Lock()  # of the two above
        self._stage_began = time.monotonic()
        self._engine: Engine | None = None
        self._owners: dict[str, Owner] = {}
        self._queue_checked = 0.0
        self._progress: float | None = None  # when the loop last got on; None while it has no work
        self._compiling_since: float | None = None
        self._compiled = 0.0  # when a step was last seen to wait for the compiler
        socket_path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(socket_path))
        socket_path.chmod(0o600)
        self._listener.listen()
        for target in (self._accept, self._watch):
            threading.Thread(target=target, name=f"jaxserve{target.__name__}", daemon=True).start()

    def starting(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Tells the front-ends how far the start is."""
        with self._lock:
            now, before = time.monotonic(), self._greeting
            if not isinstance(before, wire.Starting) or before.stage != stage:
                self._stage_began = now
            rest = (now - self._stage_began) / done * (total - done) if done else None
            self._greet(wire.Starting(stage, done, total, rest))

    def serve(self, engine: Engine, info: dict[str, Any]) -> NoReturn:
        """Serves the engine until the process ends; raises what ``Engine.step`` raises."""
        self._engine = engine
        with self._lock:
            self._greet(wire.Ready(info))
        while True:
            self._take_commands(engine)
            self._enforce_deadlines(engine)
            if engine.has_unfinished_requests:
                self._send(engine.step())
                self._progress = time.monotonic()

    # --- commands -------------------------------------------------------------------------------

    def _take_commands(self, engine: Engine) -> None:
        """Carries out what is in the inbox; waits for something when there is no other work."""
        if not engine.has_unfinished_requests:
            self._progress = None
            command = self._inbox.get()
            self._progress = time.monotonic()
            self._carry_out(engine, *command)
        with contextlib.suppress(queue.Empty):
            while True:
                self._carry_out(engine, *self._inbox.get_nowait())

    def _carry_out(
        self, engine: Engine, connection: Connection, command: wire.Message | None
    ) -> None:
        if isinstance(command, wire.Submit | wire.Embed):
            self._admit(engine, connection, command)
        elif isinstance(command, wire.Abort):
            for request_id in command.request_ids:
                self._abort(engine, connection.key(request_id))
        elif isinstance(command, wire.GetStats):
            connection.post(wire.Reply(command.request_id, _stats(engine), None))
        else:
            self._forget(engine, connection)

    def _admit(
        self, engine: Engine, connection: Connection, command: wire.Submit | wire.Embed
    ) -> None:
        key = connection.key(command.request_id)
        deadline = time.monotonic() + command.queue_timeout_s
        embeds = isinstance(command, wire.Embed)
        owner = Owner(connection, command.request_id, deadline, embeds)
        try:
            if isinstance(command, wire.Submit):
                params = SamplingParams(**command.params)
                prompt, salt = command.prompt_token_ids, command.cache_salt
                engine.add(key, prompt, params, salt, command.priority)
            else:
                pooling: Any = command.pooling  # which the engine checks
                engine.embed(key, command.prompt_token_ids, pooling)
        except InvalidRequestError as error:
            owner.refuse(wire.INVALID, str(error), error.param)
        except Exception:  # nothing that one request holds may end the others
            log.logger.exception("a request could not be admitted")
            owner.refuse(wire.FAILED, "The request could not be admitted.")
        else:
            self._owners[key] = owner

    def _abort(self, engine: Engine, key: str) -> None:
        engine.abort(key)
        self._owners.pop(key, None)

    def _forget(self, engine: Engine, connection: Connection) -> None:
        """Ends what a front-end left behind that has gone."""
        for key in [key for key, owner in self._owners.items() if owner.connection is connection]:
            self._abort(engine, key)
        with self._lock:
            self._connections.remove(connection)

    def _enforce_deadlines(self, engine: Engine) -> None:
        """Refuses the requests that waited too long for their first step."""
        now = time.monotonic()
        if now < self._queue_checked + QUEUE_CHECK_S:
            return
        self._queue_checked = now
        for request in list(engine.scheduler.waiting):
            owner = self._owners[request.request_id]
            if request.num_cached_tokens is None and owner.deadline <= now:
                self._abort(engine, request.request_id)
                owner.refuse(wire.OVERLOADED, "The request waited too long for the engine.")

    # --- news -----------------------------------------------------------------------------------

    def _send(self, updates: list[RequestUpdate]) -> None:
        """Hands the news of a step to those whom they concern."""
        news: defaultdict[Connection, list[Event]] = defaultdict(list)
        for update in updates:
            key = update.request.request_id
            owner = self._owners[key]
            if update.finish_reason is not None:
                del self._owners[key]
            if update.finish_reason is FinishReason.ERROR:
                owner.refuse(wire.FAILED, "The model's logits were not numbers.")
            elif owner.embeds:
                vector = update.embedding.tolist()
                owner.connection.post(wire.Reply(owner.request_id, vector, None))
            else:
                news[owner.connection].append(_event(owner.request_id, update))
        for connection, events in news.items():
            connection.post_events(events)

    def _greet(self, message: wire.Starting | wire.Ready) -> None:
        """Tells all, and whoever connects from now on. Needs the lock."""
        self._greeting = message
        for connection in self._connections:
            connection.post(message)

    # --- other threads --------------------------------------------------------------------------

    def _accept(self) -> None:
        number = 0
        while True:
            sock, _ = self._listener.accept()
            number += 1
            with self._lock:
                connection = Connection(sock, number, self._inbox)
                self._connections.append(connection)
                connection.post(self._greeting)

    def _watch(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            engine = self._engine
            compiling = self._observe_compiler(engine)
            progress, now = self._progress, time.monotonic()
            stalled = 0.0 if progress is None else now - max(progress, self._compiled)
            running = waiting = 0
            if engine is not None:
                running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
                # This thread needs the interpreter, which a hang in native code may hold.
                limit = self._step_timeout_s + BACKSTOP_S
                faulthandler.dump_traceback_later(limit, exit=True)
                if stalled > self._step_timeout_s:
                    _end_hung_process(engine, stalled)
            with self._lock:
                for connection in self._connections:
                    connection.post(wire.Heartbeat(stalled, running, waiting, compiling))

    def _observe_compiler(self, engine: Engine | None) -> bool:
        """Whether a step waits for a program; says so in the log, and what it took."""
        now, since = time.monotonic(), self._compiling_since
        if engine is None or not engine.stats.waiting_for_programs:
            if since is not None:
                log.logger.info("the program was compiled within %.0f s.", now - since)
            self._compiling_since = None
            return False
        if since is None:
            log.logger.info("a step waits for a program that is being compiled.")
            self._compiling_since = now
        self._compiled = now
        return True


def _end_hung_process(engine: Engine, stalled: float) -> NoReturn:
    """Writes down the state and ends the process at once: its main thread won't come back."""
    lines = [f"jaxserve: no step has completed for {stalled:.0f} s. The requests:"]
    for request in list(engine.scheduler.requests.values()):
        lines.append(
            f"  {request.request_id}: {request.status.value}, {request.num_prompt_tokens} prompt "
            f"tokens, {len(request.output_token_ids)} output tokens, row {request.row}, "
            f"{len(request.pages)} pages, {request.num_preemptions} preemptions"
        )
    print("\n".join(lines), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(wire.EXIT_HUNG)


def _event(request_id: str, update: RequestUpdate) -> Event:
    """What a step brought for one request."""
    request, reason = update.request, update.finish_reason
    is_first = len(request.token_ids) - request.num_prompt_tokens <= 1
    return Event(
        request_id,
        [] if update.token_id is None else [update.token_id],
        None if update.logprobs is None else [update.logprobs],
        None if reason is None else reason.value,
        request.stop_reason,
        request.num_cached_tokens if is_first else None,
        update.prompt_logprobs,
    )


def _stats(engine: Engine) -> dict[str, Any]:
    """The engine's counters and gauges."""
    scheduler = engine.scheduler
    total = scheduler.allocator.num_usable
    return {
        **dataclasses.asdict(engine.stats),
        "padding_waste": engine.stats.padding_waste,
        "kv_waste": engine.stats.kv_waste,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "kv_pages_used": total - scheduler.allocator.num_free,
        "kv_pages_total": total,
    }
