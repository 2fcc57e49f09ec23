"""`jaxserve serve` in a process of its own, with the demo model or with a fake engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from tests.helpers.patience import within

FAKE = """
import functools, sys
from server import engine_supervisor, serve
command = (sys.executable, *{words!r})
serve.EngineProcess = functools.partial(engine_supervisor.EngineProcess, command=command)
"""
CODE = """
{before}
import runpy
runpy.run_module("server", run_name="__main__")
"""
SECONDS = within(15.0)
NEVER = {"start": "never"}
"""An engine that is never ready."""


class Running:
    """One server.

    Args:
        words: of its command line, after ``serve``.
        fake: options of ``fake_engine_process``, or None for a real engine.
    """

    def __init__(self, *words: str, fake: dict[str, Any] | None = None) -> None:
        engine: tuple[str, ...] = ("-m", "tests.helpers.fake_engine_process", json.dumps(fake))
        if fake == NEVER:
            engine = ("-c", "import time; time.sleep(600)")
        before = "" if fake is None else FAKE.format(words=engine)
        command = [sys.executable, "-c", CODE.format(before=before), *words]
        environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [self._read("stdout", self.out), self._read("stderr", self.err)]

    def _read(self, name: str, lines: list[str]) -> threading.Thread:
        stream = getattr(self.process, name)
        thread = threading.Thread(target=lambda: lines.extend(stream), daemon=True)
        thread.start()
        return thread

    def wait_ready(self) -> str:
        """The copyable command, once the server has printed it."""
        self.wait_for(lambda: any(line.startswith("curl ") for line in self.out))
        return next(line for line in self.out if line.startswith("curl "))

    def wait_for(self, condition: Any) -> None:
        """Waits until something is so."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, f"it ended:\n{''.join(self.err)}"
            assert time.monotonic() < end, f"it takes too long:\n{''.join(self.err)}"
            time.sleep(0.02)

    def descendants(self) -> list[psutil.Process]:
        """Its processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code; all output is there then."""
        code = self.process.wait(SECONDS)
        for reader in self._readers:
            reader.join(SECONDS)
        return code


@contextlib.contextmanager
def running(*words: str, fake: dict[str, Any] | None = None) -> Iterator[Running]:
    """A server that is gone afterwards, whatever happens."""
    server = Running(*words, fake=fake)
    try:
        yield server
    finally:
        family = [] if server.process.poll() is not None else server.descendants()
        server.process.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """(status, JSON) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, data, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def temporary_socket() -> str:
    """A path that is short enough for a Unix socket."""
    return os.path.join(tempfile.mkdtemp(prefix="jaxserve-test-"), "socket")
