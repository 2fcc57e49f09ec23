"""One process that speaks HTTP: tokenizer, app and runner around an engine's client. No JAX.

``python -m server.front_end`` is one of several that share a socket; ``server.serve`` starts them.
Standard input holds one line of JSON, the settings, and then stays open: when it ends, the parent
has gone and so does this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import web

from jaxserve import demo, log
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.tokenizer import Tokenizer
from server.app import create_app, create_runner
from server.config import ServerConfig
from server.connections import accept
from server.engine_client import EngineClient
from server.service import SERVICE

DEMO_NAME = "jaxserve-demo"
LAST_BYTES_S = 2.0
"""For the ends of replies, after the engine has ended their requests."""
LAST_REPLIES_S = 0.5
"""For connections that were accepted just before the end: their requests are still on the way, and
get their refusal."""
NEW_OBJECTS = 20_000
"""So many more than at the last collection cause the next. A request that runs has hundreds: with
Python's 700, those that begin together are walked through again and again."""
EXIT_FAILED, EXIT_CANNOT_START = 1, 3
POLL_S = 0.05


@dataclass(frozen=True)
class FrontEnd:
    """What one of them serves.

    Attributes:
        engine: settings of the engine: which tokenizer, which name.
        config: of the server.
        sock: listens already.
        announce: print where it is, once the engine is ready.
    """

    engine: EngineConfig
    config: ServerConfig
    sock: socket.socket
    announce: bool = True

    async def run(self, client: EngineClient, signals: Signals, owns_engine: bool) -> int:
        """Serves until a signal comes or the engine is dead for good; returns the exit code.

        Raises:
            JaxserveError: the tokenizer or a file of the config can't be read.
        """
        tls = self.config.ssl_context()
        await client.start()
        runner: web.AppRunner | None = None
        listening: asyncio.Server | None = None
        try:
            load = asyncio.to_thread(load_tokenizer, self.engine, self.config)
            loading = asyncio.create_task(load)
            if not await _first(loading, signals.wait()):
                return 0
            names = model_names(self.engine, self.config)
            app = create_app(self.config, client, loading.result(), names)
            runner = create_runner(app)
            await runner.setup()
            assert runner.server is not None
            gc.freeze()  # else full collections walk through the tokenizer and all modules: 0.2 s
            gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
            listening = await accept(runner.server, self.sock, tls)
            announcing = asyncio.create_task(self._announce(client, loading.result()))
            failed = await _first(
                asyncio.ensure_future(_end_of(client, owns_engine)), signals.wait()
            )
            announcing.cancel()
            # A dead engine has ended its requests; all that is left is to tell their clients.
            await client.close(LAST_BYTES_S if failed else self.config.shutdown_timeout_s)
            await _last_bytes(app)
            listening.close()
            await _last_replies(runner)
            return EXIT_FAILED if failed else 0
        finally:
            if listening is not None:
                listening.close()
            if runner is not None:
                await runner.cleanup()
            await client.close()

    async def _announce(self, client: EngineClient, tokenizer: Tokenizer | None) -> None:
        """Prints where the server is, when it can serve: the last lines of the start."""
        while client.state != "ready":
            await asyncio.sleep(POLL_S)
        if self.announce:
            base, name = url(self.config, self.sock), model_names(self.engine, self.config)[0]
            print(f"jaxserve: {name} is ready at {base} (chat page, /docs, /v1)")
            print(example(self.config, base, name, tokenizer), flush=True)


def model_names(engine: EngineConfig, config: ServerConfig) -> tuple[str, ...]:
    """By which requests may call the model."""
    return config.served_model_name or (engine.model or DEMO_NAME,)


def load_tokenizer(engine: EngineConfig, config: ServerConfig) -> Tokenizer | None:
    """The model's, with the server's chat template; None with skip_tokenizer_init.

    Raises:
        JaxserveError: it can't be read.
    """
    if engine.skip_tokenizer_init:
        return None
    where = engine.tokenizer or engine.model or str(demo.target_path())
    own = engine.tokenizer is None and engine.tokenizer_revision is None
    revision = engine.revision if own else engine.tokenizer_revision
    return Tokenizer(where, revision, config.chat_template_text())


class Signals:
    """SIGINT and SIGTERM: the first ends the service in good order, the second at once.

    Args:
        at_once: called before the process exits at the second signal.
    """

    def __init__(self, at_once: Callable[[], None] = lambda: None) -> None:
        self._came = asyncio.Event()
        self._at_once = at_once
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    async def wait(self) -> None:
        """Waits for the first signal."""
        await self._came.wait()

    def _take(self, number: int) -> None:
        if self._came.is_set():
            self._at_once()
            os._exit(128 + number)
        log.logger.info("%s: shutting down; a second signal exits at once.", _name(number))
        self._came.set()


def _name(number: int) -> str:
    return signal.Signals(number).name


async def _last_bytes(app: web.Application) -> None:
    """Lets the handlers write what the engine gave them last."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_BYTES_S):
            while app[SERVICE].under_way:
                await asyncio.sleep(POLL_S)


async def _last_replies(runner: web.AppRunner) -> None:
    """Lets the connections that are open get a reply, if their requests come soon."""
    loop = asyncio.get_running_loop()
    end = loop.time() + LAST_REPLIES_S
    await asyncio.sleep(POLL_S)  # until what was accepted last is among the connections
    while runner.server is not None and runner.server.connections and loop.time() < end:
        await asyncio.sleep(POLL_S)


async def _end_of(client: EngineClient, owns_engine: bool) -> None:
    """Waits until the engine is dead for good; for ever if somebody else sees to it."""
    if owns_engine:
        await client.failed()
    else:
        await asyncio.Event().wait()


async def _first(wanted: asyncio.Future[Any], other: Any) -> bool:
    """Waits for one of two; whether it was the first, whose error is raised."""
    waiting = asyncio.ensure_future(other)
    done, _ = await asyncio.wait({wanted, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if wanted in done:
        wanted.result()
    return wanted in done


# --- What the user is told ------------------------------------------------------------------------


def url(config: ServerConfig, sock: socket.socket) -> str:
    """Where a browser or curl on this machine finds the server."""
    scheme = "https" if config.ssl_certfile else "http"
    if config.uds is not None:
        return f"{scheme}://localhost"
    host = config.host
    if config.on_all_interfaces:
        host = "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def example(config: ServerConfig, base: str, name: str, tokenizer: Tokenizer | None) -> str:
    """A ``curl`` that can be copied."""
    words = ["curl", *(["--unix-socket", config.uds] if config.uds is not None else [])]
    text = " ".join(map(shlex.quote, words))
    if config.api_keys:
        text += ' -H "Authorization: Bearer $JAXSERVE_API_KEY"'
    body: dict[str, Any] = {"model": name}
    route = "completions"
    if tokenizer is None:
        body |= {"prompt": [1, 2, 3], "max_tokens": 16}
    elif not tokenizer.hf.chat_template:
        body |= {"prompt": "Once upon a time", "max_tokens": 64}
    else:
        body["messages"] = [{"role": "user", "content": "Who are you?"}]
        route = "chat/completions"
    data = shlex.quote(json.dumps(body))
    return f"{text} {base}/v1/{route} -H 'Content-Type: application/json' -d {data}"


# --- One of several -------------------------------------------------------------------------------


def settings(front_end: FrontEnd, engine_socket: Path, announce: bool) -> bytes:
    """The line of JSON for a process of its own, which must inherit the listening socket."""
    plain = {
        "engine": vars(front_end.engine),
        "server": vars(front_end.config),
        "socket": front_end.sock.fileno(),
        "engine_socket": str(engine_socket),
        "announce": announce,
    }
    return json.dumps(plain).encode() + b"\n"


def main() -> int:
    """Serves as the settings on standard input say."""
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log.set_up()
    config = ServerConfig(**given["server"])
    front_end = FrontEnd(
        EngineConfig(**given["engine"]),
        config,
        socket.socket(fileno=given["socket"]),
        given["announce"],
    )

    async def serve() -> int:
        client = EngineClient(
            Path(given["engine_socket"]),
            max_queue=config.max_queue,
            queue_timeout_s=config.queue_timeout_s,
        )
        return await front_end.run(client, Signals(), False)

    try:
        return asyncio.run(serve())
    except JaxserveError as error:
        log.logger.error("%s", " ".join(str(error).split()))
        return EXIT_CANNOT_START


def _end_with_parent() -> NoReturn:
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(4096):
            pass
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main())
