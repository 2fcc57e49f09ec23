"""What a streamed token costs the front-end in CPU time.

    python -m tests.helpers.token_cost

loads ``jaxserve serve`` (the demo model, or with --fake an engine that costs next to nothing) with
streams of 4 and of 128 tokens from 64 clients. The difference is the cost of further tokens, the
rest that of a request. Both contain what the kernel does for the sockets. With the demo model on
few cores, the front-end finds its caches full of the engine's weights whenever its turn comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from typing import Any

import aiohttp
import psutil

from tests.server.running import free_port, running

CLIENTS, REQUESTS = 64, 640
SHORT, LONG = 4, 128
ENGINE = {"num_pages": 4096, "max_rows": CLIENTS, "max_step_tokens": CLIENTS, "vocab_size": 2000}
FAKE = {"pace": "slow", "engine": ENGINE}


async def _load(url: str, prompt: Any, max_tokens: int) -> None:
    """All requests, from as many clients as there are."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(REQUESTS // CLIENTS):
            async with session.post(url, data=data, headers=headers) as reply:
                assert reply.status == 200
                while await reply.content.readany():
                    pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))


def cost(pid: int, port: int, prompt: Any) -> tuple[float, float]:
    """(us of CPU per further token, ms per request)."""
    process, url = psutil.Process(pid), f"http://127.0.0.1:{port}/v1/completions"
    spent = []
    for length in (SHORT, LONG):
        before = process.cpu_times()
        asyncio.run(_load(url, prompt, length))
        after = process.cpu_times()
        spent.append(after.user + after.system - before.user - before.system)
    per_token = (spent[1] - spent[0]) / (REQUESTS * (LONG - SHORT))
    return 1e6 * per_token, 1e3 * (spent[0] / REQUESTS - SHORT * per_token)


def main() -> None:
    """Prints the costs of some rounds, and their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fake", action="store_true", help="an engine that costs nothing")
    parser.add_argument("--rounds", type=int, default=5, help="of measuring (%(default)s)")
    given, port = parser.parse_args(), free_port()
    with running("--port", str(port), fake=FAKE if given.fake else None) as server:
        server.wait_ready()
        pid = server.process.pid
        cost(pid, port, "Once upon a time")  # compiles what is needed
        rounds = [cost(pid, port, "Once upon a time") for _ in range(given.rounds)]
    for token, request in rounds:
        print(f"{token:6.1f} us per further token, {request:5.2f} ms per request")
    token, request = (statistics.median(values) for values in zip(*rounds))
    print(f"{token:6.1f} us per further token, {request:5.2f} ms per request (medians)")


if __name__ == "__main__":
    main()
