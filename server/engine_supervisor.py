"""Starts the engine's process, and starts it again when it died. No JAX."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxserve import log
from jaxserve.config import EngineConfig
from server import wire
from server.engine_messages import EngineLine, SilenceError
from server.wire import EXIT_CANNOT_START

COMMAND = (sys.executable, "-m", "server.engine_process")
LONGEST_BACK_OFF_S = 30.0
GOOD_LIFE_S = 60.0
"""A process that lived so long is started again without much delay when it dies."""
LONGEST_SILENCE_S = 10.0
"""A process that serves and says nothing for so long is killed. Longer than what front-ends wait,
since a start costs more than a request."""
LONGEST_SILENCE_AT_START_S = 120.0
"""The same while it starts: native code that loads weights may hold Python's lock, for instance as
it waits for a slow disk."""
CONNECT_S = 0.25


class EngineProcess:
    """The engine's process and its successors.

    It ends with this process, however this one ends: its standard input is a pipe from here.

    Args:
        config: of the engine.
        warmup: "full" compiles every program before it serves; "background" serves as soon
            as it can and compiles the rest meanwhile.
        step_timeout_s: a step that takes longer counts as hung; the process is ended then.
        restart: start it again when it died.
        back_off_s: the delay before that, doubled each time up to LONGEST_BACK_OFF_S.
        silence_s: without a word for so long, a process that was ready is killed.
        command: what to run.

    Attributes:
        socket_path: where its clients find it.
        pid: of the process that runs now; None if none does.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        warmup: Literal["full", "background"] = "background",
        step_timeout_s: float = 300.0,
        restart: bool = True,
        back_off_s: float = 1.0,
        silence_s: float = LONGEST_SILENCE_S,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="jaxserve-"))  # for this user alone
        self.socket_path = self._directory / "engine"
        self.pid: int | None = None
        self._settings = {
            "engine": dataclasses.asdict(config),
            "socket_path": str(self.socket_path),
            "step_timeout_s": step_timeout_s,
            "warmup": warmup,
        }
        self._restart = restart
        self._back_off_s = back_off_s
        self._silence_s = silence_s
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[str] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the process and watches over it from now on; doesn't wait until it can serve."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())
        self._listener = asyncio.create_task(self._kill_when_silent())

    async def failed(self) -> str:
        """Waits until the process is dead for good; says why. Its owner should exit then.

        That is when it may not be started again, or could not start the first time.
        """
        assert self._keeper is not None, "start() comes first"
        return await asyncio.shield(self._keeper)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Ends the process, by force after the grace. Safe to call twice."""
        for task in (self._listener, self._keeper):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(grace_s):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        self.pid = None
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _keep(self) -> str:
        delay, first = self._back_off_s, True
        while True:
            assert self._process is not None
            began = time.monotonic()
            code = await self._process.wait()
            self.pid = None
            reason = f"the engine's process ended ({_in_words(code)})"
            if not self._restart or (first and code == EXIT_CANNOT_START):
                log.logger.error("%s.", reason)
                return reason
            first = False
            if time.monotonic() - began > GOOD_LIFE_S:
                delay = self._back_off_s
            log.logger.error("%s; it is started again in %.1f s.", reason, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_BACK_OFF_S)
            await self._spawn()

    async def _kill_when_silent(self) -> None:
        """Listens to the process and its successors, like a front-end that asks for nothing."""
        while True:
            process = self._process
            try:
                await self._listen()
            except SilenceError as error:
                log.logger.error("the engine's process is killed: %s.", error)
                with contextlib.suppress(ProcessLookupError):
                    if process is not None and process.returncode is None:
                        process.kill()
            except (OSError, wire.WireError):
                pass  # it is not there (yet, or any more)
            await asyncio.sleep(CONNECT_S)

    async def _listen(self) -> None:
        """Raises what ``EngineLine.hear`` raises. A process that has not opened its socket yet is
        not silent: it may take its time until then."""
        limit = LONGEST_SILENCE_AT_START_S

        def take(message: wire.Message) -> None:
            nonlocal limit
            if isinstance(message, wire.Ready):
                limit = self._silence_s

        line = await EngineLine.open(self.socket_path, take)
        await line.hear(lambda: limit)

    async def _spawn(self) -> None:
        # In a session of its own it doesn't get the terminal's Ctrl-C, which is for us to handle.
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self.pid = process.pid
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._settings).encode() + b"\n")


def _in_words(code: int) -> str:
    """An exit code, or the signal that ended a process."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
