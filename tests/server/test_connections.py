"""More connections than there are descriptors for: some are refused, nobody else is disturbed."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import psutil
import pytest

from server.connections import REFUSAL_S
from tests.helpers.many_connections import FAKE, hold, words
from tests.helpers.patience import timeout, within
from tests.server.running import Running, free_port, running

FILES = 400
"""Descriptors that the server may open: half of them are for connections."""
NO_TEXT = "--skip-tokenizer-init"
STREAM = {"prompt": [1, 2, 3], "max_tokens": 150, "ignore_eos": True, "temperature": 0}
STREAM |= {"stream": True, "return_token_ids": True}


def test_a_thousand_connections_hold() -> None:
    """Ten thousand of them: python -m tests.helpers.many_connections."""
    port = free_port()
    with running(*words(port, 1000), fake=FAKE) as server:
        server.wait_ready()
        figures = asyncio.run(hold(server.process.pid, port, 1000))
    assert figures["replies"] == [{0: 750, 200: 250}] * 2
    assert min(figures["generating"]) >= 450
    assert figures["bystanders_differ"] == [0, 0]
    assert figures["left_over"] == {}
    assert figures["health_ms"]["p50"] < 1e3 * within(0.5)
    for before, _, _, _, after in figures["fds"].values():
        assert after <= before
    for _, first, _, second, _ in figures["rss_mib"].values():
        assert second < first * 1.1 + 4


async def tokens(url: str) -> list[int]:
    """Of a stream, however many of them come in one event."""
    post = aiohttp.request("POST", f"{url}/v1/completions", json=STREAM)
    async with post as reply:
        assert reply.status == 200
        lines = (await reply.text()).split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [token for event in events for token in event["choices"][0]["token_ids"]]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
    """(status, body) of /health on an open connection."""
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def health(url: str) -> int:
    """The status of /health on a new connection."""
    async with aiohttp.request("GET", f"{url}/health") as reply:
        return reply.status


async def flood(server: Running, port: int) -> None:
    url, process = f"http://127.0.0.1:{port}", psutil.Process(server.process.pid)
    expected = await tokens(url)
    stream = asyncio.create_task(tokens(url))
    friend = await asyncio.open_connection("127.0.0.1", port)
    assert (await ask(*friend))[0] == 200
    crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * FILES)]
    assert process.num_fds() < FILES - 50
    await asyncio.sleep(REFUSAL_S + 0.2)  # those of the crowd that ask nothing are dropped by then
    late = await asyncio.open_connection("127.0.0.1", port)
    status, body = await ask(*late)
    assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
    assert await late[0].read() == b""  # closed
    assert (await ask(*friend))[0] == 200
    assert await stream == expected
    for _, writer in crowd:
        writer.transport.abort()
    async with timeout(10):
        while await health(url) != 200:
            await asyncio.sleep(0.05)


def test_connections_beyond_the_limit_are_refused_before_descriptors_run_out() -> None:
    if not hasattr(psutil.Process, "rlimit"):
        pytest.skip("needs a system where a process's limits can be set from outside")
    port = free_port()
    fake = {"pace": "slow", "engine": {"num_pages": 512}}
    with running("--port", str(port), NO_TEXT, fake=fake) as server:
        psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, (FILES, FILES))
        server.wait_ready()
        asyncio.run(flood(server, port))
        assert sum("connections are refused" in line for line in server.err) == 1
        assert not any("Traceback" in line or "out of system" in line for line in server.err)
