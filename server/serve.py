"""Listens, starts the engine's process and the front-ends. A composition root."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import sys
from typing import Any

from jaxserve import log
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from server.config import ServerConfig
from server.connections import BACKLOG
from server.engine_client import EngineClient
from server.engine_supervisor import EngineProcess
from server.front_end import EXIT_CANNOT_START, EXIT_FAILED, FrontEnd, Signals, settings

COMMAND = (sys.executable, "-m", "server.front_end")
RESPAWN_S = 1.0
EXIT_GRACE_S = 5.0
"""For front-ends to exit after their requests have had their time."""


def serve(engine: EngineConfig, config: ServerConfig, changed: dict[str, Any]) -> int:
    """Serves until a signal comes; returns the exit code.

    Args:
        engine: settings of the engine.
        config: of the server.
        changed: the settings that aren't at their defaults, for the log.

    Raises:
        JaxserveError: it can't listen there, or a file can't be read.
    """
    os.environ["JAXSERVE_LOG_LEVEL"] = config.log_level  # the other processes' too
    log.set_up()
    log.logger.info("settings: %s", changed or "all at their defaults")
    config.ssl_context()
    config.chat_template_text()
    with listen(config) as sock:
        _warn(config)
        _allow_many_files()
        try:
            return asyncio.run(_serve(FrontEnd(engine, config, sock)))
        finally:
            if config.uds is not None:
                with contextlib.suppress(OSError):
                    os.unlink(config.uds)


async def _serve(front_end: FrontEnd) -> int:
    config = front_end.config
    process = EngineProcess(
        front_end.engine, step_timeout_s=config.step_timeout_s, restart=config.restart
    )
    if config.api_server_count > 1:
        return await FrontEnds(front_end, process).run()
    client = EngineClient(
        process, max_queue=config.max_queue, queue_timeout_s=config.queue_timeout_s
    )
    return await front_end.run(client, Signals(lambda: _kill(process)), True)


class FrontEnds:
    """Several processes on one socket; this one only watches over them and the engine."""

    def __init__(self, front_end: FrontEnd, engine: EngineProcess) -> None:
        self._front_end = front_end
        self._engine = engine
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    async def run(self) -> int:
        """Serves until a signal comes, or a part fails for good; returns the exit code."""
        signals = Signals(self._kill)
        await self._engine.start()
        count = self._front_end.config.api_server_count
        tasks = [asyncio.create_task(self._keep(index)) for index in range(count)]
        tasks.append(asyncio.create_task(self._engine_failed()))
        tasks.append(asyncio.create_task(self._stopped(signals)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return max(task.result() for task in done)
        finally:
            for task in tasks:
                task.cancel()
            await self._stop()

    async def _keep(self, index: int) -> int:
        """Starts a front-end again whenever it died; returns if it could not start."""
        while True:
            code = await self._run_one(index)
            if code == EXIT_CANNOT_START:
                return EXIT_FAILED
            log.logger.error("front-end %d ended with code %d; it is started again.", index, code)
            await asyncio.sleep(RESPAWN_S)

    async def _run_one(self, index: int) -> int:
        fd = self._front_end.sock.fileno()
        # In a session of its own it doesn't get the terminal's Ctrl-C, which is for us to handle.
        process = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=asyncio.subprocess.PIPE, pass_fds=[fd], start_new_session=True
        )
        self._processes[index] = process
        assert process.stdin is not None
        process.stdin.write(settings(self._front_end, self._engine.socket_path, index == 0))
        return await process.wait()

    async def _engine_failed(self) -> int:
        await self._engine.failed()
        return EXIT_FAILED

    async def _stopped(self, signals: Signals) -> int:
        await signals.wait()
        return 0

    async def _stop(self) -> None:
        """Lets the front-ends end their requests, then ends the engine."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        waits = [process.wait() for process in self._processes.values()]
        try:
            async with asyncio.timeout(self._front_end.config.shutdown_timeout_s + EXIT_GRACE_S):
                await asyncio.gather(*waits)
        except TimeoutError:
            self._kill_front_ends()
        await self._engine.stop()

    def _kill_front_ends(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _kill(self) -> None:
        self._kill_front_ends()
        _kill(self._engine)


def _kill(engine: EngineProcess) -> None:
    if engine.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine.pid, signal.SIGKILL)


# --- Listening ------------------------------------------------------------------------------------


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens where the config says; connections wait in it from now on.

    Raises:
        ConfigError: the port or the path is in use, or there is no such address.
    """
    try:
        if config.uds is not None:
            return _listen_at_path(config.uds)
        flags = socket.AI_PASSIVE
        host = None if config.on_all_interfaces and config.host != "::" else config.host
        if host is None:
            host = "0.0.0.0"
        found = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM, flags=flags)
        # A name such as localhost may have both kinds of address.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        place = config.uds or f"{config.host}:{config.port}"
        if error.errno == errno.EADDRINUSE:
            flag = "--uds" if config.uds else "--port"
            raise ConfigError(f"{place} is in use; choose another with {flag}.") from error
        raise ConfigError(f"can't listen on {place}: {error.strerror or error}.") from error


def _listen_at_path(path: str) -> socket.socket:
    """A Unix socket; takes the place of one that nobody listens on any more."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "there is a file that is no socket")
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.socket(socket.AF_UNIX) as other,
            ):
                other.connect(path)
                raise OSError(errno.EADDRINUSE, "in use")
            os.unlink(path)
        sock.bind(path)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _warn(config: ServerConfig) -> None:
    if config.on_all_interfaces and not config.api_keys:
        log.logger.warning(
            "WARNING: everybody who can reach this machine may use the server. Give --api-key, or "
            "listen on 127.0.0.1 only."
        )


def _allow_many_files() -> None:
    """As many open connections as the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
