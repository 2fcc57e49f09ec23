"""Holds thousands of connections to a server, and looks at what becomes of others meanwhile.

    python -m tests.helpers.many_connections --count 10000

starts a server with a fake engine. A quarter of the connections never send anything, a quarter
stay open after a reply, half have a stream running or waiting for its turn. Meanwhile /health is
asked over and over and bystanders generate, whose tokens must be what they were before; at last all
leave at once, and nothing may stay behind. It prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any

import aiohttp
import numpy as np

from tests.helpers.server_watch import Usage, Watch, fds_settle, lag_p99_ms, left_over, scrape
from tests.server.running import free_port, running

FAKE = {"pace": "slow", "engine": {"num_pages": 1024, "max_rows": 16, "max_step_tokens": 64}}
"""So slow that the crowd's streams don't come to an end meanwhile, but for some."""
AT_ONCE = 200
"""Connections that are being made at the same time."""
BYSTANDERS = 3
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CROWD = {"prompt": [5, 6], "max_tokens": 50, "ignore_eos": True, "stream": True}
BYSTANDER = {"prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True, "temperature": 0}
BYSTANDER |= {"stream": True, "return_token_ids": True, "priority": -1}
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def words(port: int, count: int) -> list[str]:
    """The server's command line for so many connections."""
    return [
        *("--port", str(port), "--skip-tokenizer-init", "--max-queue", str(count)),
        *("--keep-alive", "600", "--queue-timeout", "600"),
    ]


def post(body: dict[str, Any]) -> bytes:
    """A POST to /v1/completions."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def hold(pid: int, port: int, count: int) -> dict[str, Any]:
    """Holds ``count`` connections to the server of this process and port, twice.

    Freed memory goes back to Python's allocator, not to the system, so a leak shows itself by what
    the second time adds to the first.

    Returns:
        for both times connect_s, generating (requests under way), replies (how often each status
        came; 0 is none yet), bystanders_differ (how many had other tokens than alone) and leave_s
        until nothing was left of all that; for all the time health_ms (p50, p99 and max, on fresh
        connections) and loop_lag_p99_ms; rss_mib and fds of each process before, meanwhile, after,
        meanwhile and after; left_over.
    """
    watch, url = Watch(pid), f"http://127.0.0.1:{port}"
    health: list[float] = []
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        expected = await _tokens(session, url)
        await asyncio.sleep(1)  # the supervisor connects to the engine meanwhile
        moments, rounds = [watch.usage()], []
        start = await scrape(session, url)
        for _ in range(2):
            checking = asyncio.create_task(_check_health(url, health))
            rounds.append(await _hold_once(session, port, count, moments, watch, expected))
            checking.cancel()
            moments.append(await fds_settle(watch, moments[0]))
        end = await scrape(session, url)
        left = await left_over(session, url)
        checking.cancel()
    p50, p99 = np.percentile(health, [50, 99]) * 1e3
    return {
        "connections": count,
        **{key: [one[key] for one in rounds] for key in rounds[0]},
        "health_ms": {"p50": round(p50, 1), "p99": round(p99, 1), "max": round(1e3 * max(health))},
        "loop_lag_p99_ms": round(lag_p99_ms(start, end), 1),
        "rss_mib": {n: [round(at[n].rss / 2**20, 1) for at in moments] for n in moments[0]},
        "fds": {n: [at[n].fds for at in moments] for n in moments[0]},
        "left_over": left,
    }


async def _hold_once(
    session: aiohttp.ClientSession,
    port: int,
    count: int,
    moments: list[dict[str, Usage]],
    watch: Watch,
    expected: list[int],
) -> dict[str, Any]:
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    gate = asyncio.Semaphore(AT_ONCE)
    made = await asyncio.gather(*(_connect(port, i % 4, gate) for i in range(count)))
    connect_s = time.monotonic() - began
    generating = await _load(session, url, int(count * 0.45))
    texts = await asyncio.gather(*(_tokens(session, url) for _ in range(BYSTANDERS)))
    moments.append(watch.usage())
    began = time.monotonic()
    for (_, writer), _ in made:
        writer.transport.abort()
    await left_over(session, url)
    return {
        "connect_s": round(connect_s, 2),
        "generating": generating,
        "replies": dict(Counter(status for _, status in made)),
        "bystanders_differ": sum(text != expected for text in texts),
        "leave_s": round(time.monotonic() - began, 2),
    }


async def _check_health(url: str, seconds: list[float]) -> None:
    """Asks /health over and over, each time on a new connection."""
    while True:
        began = time.monotonic()
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as reply:
            assert reply.status == 200
            await reply.read()
        seconds.append(time.monotonic() - began)
        await asyncio.sleep(0.02)


async def _connect(port: int, kind: int, gate: asyncio.Semaphore) -> tuple[Connection, int]:
    """A connection, and the status of its reply; streams have none yet while they wait."""
    async with gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
        status = 0
        if kind == 1:
            writer.write(HEALTH)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split()[1])
        elif kind > 1:
            writer.write(post(CROWD))
        return (reader, writer), status


async def _load(session: aiohttp.ClientSession, url: str, expected: int) -> int:
    """Requests under way, once there are as many as expected, or after a while."""
    for _ in range(100):
        async with session.get(f"{url}/load") as reply:
            load = int((await reply.json())["server_load"])
        if load >= expected:
            break
        await asyncio.sleep(0.1)
    return load


async def _tokens(session: aiohttp.ClientSession, url: str) -> list[int]:
    """The tokens of a greedy stream that has precedence."""
    tokens: list[int] = []
    async with session.post(f"{url}/v1/completions", json=BYSTANDER) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    return tokens


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="connections (%(default)s)")
    count, port = parser.parse_args().count, free_port()
    with running(*words(port, count), fake=FAKE) as server:
        server.wait_ready()
        print(json.dumps(asyncio.run(hold(server.process.pid, port, count)), indent=2))


if __name__ == "__main__":
    main()
