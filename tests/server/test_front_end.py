"""How one front-end ends: nobody whose connection was accepted is left without a reply."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from jaxserve import EngineConfig
from server.config import ServerConfig
from server.front_end import FrontEnd
from tests.helpers.fake_engine_client import FakeEngineClient
from tests.helpers.patience import timeout, until, within
from tests.helpers.serving import story


class Client(FakeEngineClient):
    """A fake engine's client with a life; it drains at once, since the tests have no request under
    way when it closes."""

    def __init__(self) -> None:
        super().__init__(list(story()))
        self.dead = asyncio.Event()

    async def start(self) -> None:
        pass

    async def failed(self) -> str:
        await self.dead.wait()
        return "it is dead"

    async def close(self, drain_s: float = 0) -> None:
        self.state = "closed"


class Signal:
    """A first signal that the test sends."""

    def __init__(self) -> None:
        self.came = asyncio.Event()

    async def wait(self) -> None:
        await self.came.wait()


async def reply(reader: asyncio.StreamReader, writer: Any, path: str) -> tuple[int, Any]:
    """(status, JSON) of a GET on an open connection."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head, "the connection was closed without a reply"
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("reason", ["signal", "dead engine"])
def test_a_connection_accepted_just_before_the_end_gets_a_reply(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.front_end.LAST_REPLIES_S", within(0.5))

    async def main() -> None:
        client, signals = Client(), Signal()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            sock.setblocking(False)
            address = sock.getsockname()
            front = FrontEnd(EngineConfig(skip_tokenizer_init=True), ServerConfig(), sock, False)
            running = asyncio.create_task(front.run(client, signals, True))  # type: ignore[arg-type]
            first = await asyncio.open_connection(*address)
            assert (await reply(*first, "/ready"))[0] == 200
            second = await asyncio.open_connection(*address)
            (client.dead if reason == "dead engine" else signals.came).set()
            await until(lambda: client.state == "closed")
            status, body = await reply(*second, "/ready")
            assert (status, body["error"]["code"]) == (503, "shutting_down")
            assert await running == (1 if reason == "dead engine" else 0)
            for _, writer in (first, second):
                writer.close()

    asyncio.run(asyncio.wait_for(main(), within(20)))


def test_a_front_end_without_connections_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for no request that may be on its way."""
    monkeypatch.setattr("server.front_end.LAST_REPLIES_S", 3600)

    async def main() -> None:
        client, signals = Client(), Signal()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            front = FrontEnd(EngineConfig(skip_tokenizer_init=True), ServerConfig(), sock, False)
            running = asyncio.create_task(front.run(client, signals, True))  # type: ignore[arg-type]
            await asyncio.sleep(0.2)
            signals.came.set()
            async with timeout(0.5):
                assert await running == 0

    asyncio.run(asyncio.wait_for(main(), within(20)))
