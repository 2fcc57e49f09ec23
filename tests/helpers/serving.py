"""A front-end with a fake engine, on a port of its own."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from jaxserve.demo import target_path
from jaxserve.tokenizer import Tokenizer
from server.app import create_app, create_runner
from server.config import ServerConfig
from tests.helpers.fake_engine_client import STORY, FakeEngineClient

MODEL = "demo"


@functools.cache
def demo_tokenizer() -> Tokenizer:
    """The demo model's."""
    return Tokenizer(str(target_path()))


@functools.cache
def story() -> tuple[int, ...]:
    """STORY's token ids."""
    return tuple(demo_tokenizer().encode(STORY, add_special_tokens=False))


class Front:
    """A running front-end and a client for it."""

    def __init__(self, engine: FakeEngineClient, port: int, session: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.session = session

    async def request(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> tuple[int, Any, Any]:
        """(status, JSON or text, headers) of a reply."""
        if body is not None:
            options["json"] = body
        async with self.session.request(method, self.url + path, **options) as reply:
            text = await reply.text()
            is_json = reply.content_type == "application/json"
            value = json.loads(text) if is_json and text else text
            return reply.status, value, reply.headers

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """(status, JSON) of a POST."""
        status, value, _ = await self.request("POST", path, body, **options)
        return status, value

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        """(status, JSON or text) of a GET."""
        status, value, _ = await self.request("GET", path, **options)
        return status, value

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The JSON of all events of a streamed reply; "[DONE]" as that text."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            return parse_events(await reply.text())


def parse_events(text: str) -> list[Any]:
    """The events of a whole stream; it must hold nothing but events and comments."""
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: ") and "\n" not in block, block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


@asynccontextmanager
async def front_end(
    engine: FakeEngineClient | None = None,
    tokenizer: bool = True,
    send_buffer: int | None = None,
    **settings: Any,
) -> AsyncIterator[Front]:
    """A front-end with these settings of ServerConfig; the system keeps ``send_buffer`` bytes that
    a client doesn't read."""
    engine = engine or FakeEngineClient(list(story()))
    config = ServerConfig(**settings)
    names = config.served_model_name or (MODEL,)
    app = create_app(config, engine, demo_tokenizer() if tokenizer else None, names)
    runner = create_runner(app)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:  # connections inherit it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    await web.SockSite(runner, sock).start()
    port = sock.getsockname()[1]
    try:
        async with aiohttp.ClientSession() as session:
            yield Front(engine, port, session)
    finally:
        await runner.cleanup()
