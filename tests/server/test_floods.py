"""Floods of odd, half-sent and unread requests: they end in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.helpers.fake_engine_client import FakeEngineClient
from tests.helpers.patience import timeout, within
from tests.helpers.serving import Front, front_end, story
from tests.server.test_bad_input import attack

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "Hi", "max_tokens": 1}'
CHUNKED = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
LAST = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def play(attacks: Callable[[Front], Awaitable[None]], **settings: Any) -> None:
    """Attacks a front-end, beside a bystander whose text must stay what it was."""

    async def main() -> None:
        engine = FakeEngineClient(list(story()), capacity=2000, step_s=0.003)
        async with front_end(engine, **settings) as front:
            await attack(front, attacks(front))
            status, _ = await front.post("/v1/completions", json.loads(BODY))
            assert status == 200

    asyncio.run(asyncio.wait_for(main(), within(60)))


async def connect(front: Front, stack: AsyncExitStack) -> Stream:
    """A connection that takes little at a time, and is closed with the stack."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", front.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=2**12)
    stack.callback(writer.close)
    return reader, writer


async def exchange(front: Front, data: bytes) -> bytes:
    """All that comes back for some bytes until the server closes the connection."""
    async with AsyncExitStack() as stack:
        reader, writer = await connect(front, stack)
        writer.write(data)
        async with timeout(20):
            return await reader.read()


# --- framing --------------------------------------------------------------------------------------

FRAMINGS = {
    "both lengths": "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "two codings": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "signed length": "Content-Length: +2\r\n\r\n{}",
    "bare line feeds": "X: y\nContent-Length: 2\n\n{}",
    "space before the colon": "Content-Length : 2\r\n\r\n{}",
    "a size that overflows": f"Transfer-Encoding: chunked\r\n\r\n{'f' * 17}\r\n{{}}",
    "a size that is no number": "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than its size": "Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "a line break in an id": "X-Request-Id: a\r\n b: c\r\nContent-Length: 2\r\n\r\n{}",
    "an id of 10 kB": f"X-Request-Id: {'x' * 10_000}\r\nContent-Length: 2\r\n\r\n{{}}",
}


def test_ambiguous_framing_is_refused_once(caplog: pytest.LogCaptureFixture) -> None:
    """What follows a refused head is never taken for a second request; and no client can fill the
    log."""

    async def attacks(front: Front) -> None:
        for name, data in FRAMINGS.items():
            reply = await exchange(front, (HEAD + data + LAST).encode())
            assert re.findall(rb"HTTP/1\.[01] (\d+)", reply) == [b"400"], (name, reply[:300])

    play(attacks)
    assert not caplog.records


def test_a_hundred_thousand_chunks_of_one_byte_are_one_body() -> None:
    async def attacks(front: Front) -> None:
        padded = BODY + b" " * (100_000 - len(BODY))
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in padded)
        reply = await exchange(front, CHUNKED + chunks + b"0\r\n\r\n" + LAST.encode())
        assert reply.startswith(b"HTTP/1.1 200 ")

    play(attacks)


def test_ten_thousand_requests_in_one_go_are_answered_in_order() -> None:
    async def attacks(front: Front) -> None:
        one = "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: {}\r\n\r\n"
        data = "".join(map(one.format, range(10_000))) + LAST
        ids = re.findall(rb"X-Request-Id: (\d+)\r", await exchange(front, data.encode()))
        assert ids == [b"%d" % index for index in range(10_000)]

    play(attacks)


# --- waiting --------------------------------------------------------------------------------------


async def all_closed(streams: list[Stream], seconds: float) -> list[bytes]:
    """What each connection brings until the server closes it; fails if one stays open."""
    async with timeout(seconds):
        return await asyncio.gather(*(reader.read() for reader, _ in streams))


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nHost:", b""),
        (f'{HEAD}Content-Length: 100\r\n\r\n{{"prompt":'.encode(), b"HTTP/1.1 408 "),
        (CHUNKED + b"a\r\n", b"HTTP/1.1 408 "),
    ],
    ids=["head", "body", "chunk"],
)
def test_five_hundred_half_sent_requests_are_cut_off(data: bytes, reply: bytes) -> None:
    async def attacks(front: Front) -> None:
        async with AsyncExitStack() as stack:
            streams = []
            for _ in range(500):
                streams.append(await connect(front, stack))
                streams[-1][1].write(data)  # at once: who says nothing is cut off without a reply
            for got in await all_closed(streams, 15):
                assert got.startswith(reply) and (reply or not got)

    play(attacks, keep_alive_s=1.0, read_timeout_s=1.0)


def test_a_hundred_streams_that_nobody_reads_are_cut_off() -> None:
    """Each of their twelve choices begins with the ids of a long prompt: more than buffers hold."""

    async def attacks(front: Front) -> None:
        body = {"prompt": [1234] * 1900, "return_token_ids": True, "n": 12, "max_tokens": 100}
        data = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
        async with AsyncExitStack() as stack:
            streams = [await connect(front, stack) for _ in range(100)]
            for _, writer in streams:
                writer.write(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            async with timeout(30):
                while 'route="/v1/completions",status="499"} 100.0' not in await metrics(front):
                    await asyncio.sleep(0.1)

    play(attacks, write_timeout_s=0.5, send_buffer=4096)


async def metrics(front: Front) -> str:
    return str((await front.get("/metrics"))[1])
