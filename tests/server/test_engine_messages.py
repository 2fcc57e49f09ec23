"""Silence is what the engine doesn't say, not what this process has no time to hear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server import engine_messages, wire
from server.engine_messages import EngineLine, SilenceError
from tests.helpers.patience import within
from tests.server.running import temporary_socket

BEAT = wire.encode(wire.Heartbeat(0.0, 0, 0, False))
Speaker = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def heard_from(speaker: Speaker, meanwhile: Callable[[], None] = lambda: None) -> int:
    """How many messages came before the connection ended; ``meanwhile`` holds the loop up."""
    path = temporary_socket()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await speaker(writer)
        writer.close()

    messages: list[wire.Message] = []

    def take(message: wire.Message) -> None:
        messages.append(message)
        meanwhile()

    async with await asyncio.start_unix_server(serve, path):
        line = await EngineLine.open(Path(path), take)
        try:
            await line.hear(lambda: 0.5)
        except ConnectionResetError:
            return len(messages)
        finally:
            Path(path).unlink()
    raise AssertionError("it never ends without an error")


@pytest.fixture(autouse=True)
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_messages, "TICK_S", 0.05)


def test_all_that_is_said_is_heard() -> None:
    async def speaker(writer: asyncio.StreamWriter) -> None:
        for _ in range(8):
            writer.write(BEAT)
            await asyncio.sleep(0.1)

    assert asyncio.run(heard_from(speaker)) == 8


def test_silence_ends_the_connection() -> None:
    async def speaker(writer: asyncio.StreamWriter) -> None:
        writer.write(BEAT + BEAT[:7])  # half a message is no word
        await asyncio.sleep(3600)

    began = time.monotonic()
    with pytest.raises(SilenceError, match=r"nothing was heard for 0\.5 s"):
        asyncio.run(heard_from(speaker))
    assert 0.4 < time.monotonic() - began < within(3)


def test_a_process_that_was_held_up_itself_hears_what_came_meanwhile() -> None:
    async def speaker(writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            writer.write(BEAT)
            await asyncio.sleep(0.1)

    assert asyncio.run(heard_from(speaker, lambda: time.sleep(1))) == 3


def test_what_is_no_message_ends_the_connection() -> None:
    async def speaker(writer: asyncio.StreamWriter) -> None:
        writer.write(BEAT + wire.HEADER.pack(1) + b"\xc0")
        await asyncio.sleep(3600)

    with pytest.raises(wire.WireError, match="no message"):
        asyncio.run(heard_from(speaker))
