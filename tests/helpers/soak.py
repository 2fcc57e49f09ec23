"""Loads a server for minutes as its clients would, and measures what that does to it.

    python -m tests.helpers.soak --minutes 10

starts ``jaxserve serve`` with the demo model. 64 clients stream chats and completions one after the
other; some leave early, some send what must be refused. It prints a table of what was promised and
measured, then all figures as JSON; the exit code is 1 if a promise was broken. Clients, front-end
and engine share the machine, so on two cores the times are those of a fully loaded one.

What the front-end costs for each streamed token contains its share of the request, so it depends on
how many tokens a stream has. The demo model ends its answers after about 37; the same server gets
the same load once more with streams of 128. Among the figures is also how the cost divides into
tokens and requests (``token_cost``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import aiohttp
import numpy as np

from tests.helpers.mixed_load import BEGINNINGS, Load, Plan, Tally
from tests.helpers.patience import until
from tests.helpers.server_watch import (
    Usage,
    Watch,
    fds_settle,
    lag_p99_ms,
    left_over,
    rss_mib,
    scrape,
)
from tests.helpers.token_cost import cost
from tests.server.running import free_port, running

COMPILED_WITHIN_S = 90.0
"""On a CPU, programs are compiled while the server already serves; they come before the load."""
LONG_TOKENS, LONG_MINUTES = 128, 2.0
"""What serving benchmarks ask for unless told otherwise (``vllm bench serve``); how long here."""
COST_ROUNDS = 3
MAX_US_PER_TOKEN = 40.0
MAX_RSS_GROWTH, RSS_NOISE_MIB = 1.05, 4.0


async def soak(
    plan: Plan, pid: int, port: int, enough: Callable[[Tally], bool] = lambda tally: True
) -> dict[str, Any]:
    """Loads the server of this process and port; returns the figures that ``main`` prints.

    The load lasts as long as planned, and then until there has been ``enough``.
    """
    watch, url = Watch(pid), f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as session:
        idle = await _used_once(session, url, watch)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as clients:
            load = Load(plan, url, clients)
            await _warm_up(session, url, plan.warm_up_s)
            load.tally = tally = Tally(time.monotonic())
            before, cpu = await scrape(session, url), watch.cpu_s()
            async with watch.sampling():
                await asyncio.sleep(plan.seconds)
                await until(lambda: enough(tally), 60)
            after = await scrape(session, url)
            user, system = (now - then for now, then in zip(watch.cpu_s(), cpu))
            await load.stop()
        left = await left_over(session, url)
        end = await scrape(session, url)
        quiet = await fds_settle(watch, idle)
    tokens = after["generation_tokens_total"] - before["generation_tokens_total"]
    parts = max(2, round(plan.seconds / 60))
    minutes = _ttft(tally, plan.seconds, parts)
    return {
        "plan": asdict(plan),
        "requests": dict(tally.counts),
        "wrong": dict(tally.wrong),
        "replies_5xx": sum(v for k, v in end.items() if k.startswith("replies 5")),
        "texts": len(tally.texts),
        "texts_that_differ": [k for k, texts in tally.texts.items() if len(texts) > 1],
        "ttft": minutes,
        "ttft_ratio": minutes[-1]["p99_s"] / minutes[0]["p99_s"],
        "loop_lag_p99_ms": lag_p99_ms(before, after),
        "tokens_per_s": tokens / plan.seconds,
        "tokens_per_request": tokens / max(1, tally.counts.total()),
        "front_end_us_per_token": 1e6 * (user + system) / tokens,
        "of_them_system_us": 1e6 * system / tokens,
        "rss_mib": {name: rss_mib(samples, parts) for name, samples in watch.samples.items()},
        "fds": {name: _fds(idle[name], watch.samples[name], quiet[name]) for name in idle},
        "left_over": left,
    }


async def _used_once(session: aiohttp.ClientSession, url: str, watch: Watch) -> dict[str, Usage]:
    """What the server uses when it is idle again after its first request."""
    async with session.post(
        f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}
    ) as reply:
        await reply.read()
    await asyncio.sleep(1)  # the supervisor connects to the engine meanwhile
    return watch.usage()


async def _warm_up(session: aiohttp.ClientSession, url: str, least_s: float) -> None:
    """Waits until no program has been compiled for as long, but not for ever."""
    end, count = time.monotonic() + COMPILED_WITHIN_S, -1.0
    while time.monotonic() < end:
        await asyncio.sleep(least_s)
        last, count = count, (await scrape(session, url))["compilations_total"]
        if count == last:
            return


def _ttft(tally: Tally, seconds: float, parts: int) -> list[dict[str, float]]:
    """p50 and p99 for each part of the time; NaN where no stream began."""
    groups: list[list[float]] = [[] for _ in range(parts)]
    for began, ttft in tally.ttft:
        place = int((began - tally.began) / seconds * parts)
        if 0 <= place < parts:
            groups[place].append(ttft)
    result = []
    for group in groups:
        p50, p99 = np.percentile(group or [math.nan], [50, 99])
        result.append({"streams": len(group), "p50_s": float(p50), "p99_s": float(p99)})
    return result


def _fds(before: Usage, during: list[Usage], after: Usage) -> dict[str, int]:
    return {
        "before": before.fds,
        "most": max(usage.fds for usage in during),
        "after": after.fds,
    }


def promises(figures: dict[str, Any]) -> list[tuple[str, Any, str, bool]]:
    """(what, measured, promised, kept)"""
    rows = [
        ("5xx replies", figures["replies_5xx"], "0", figures["replies_5xx"] == 0),
        ("unexpected", sum(figures["wrong"].values()), "0", not figures["wrong"]),
        ("left behind", figures["left_over"], "nothing", not figures["left_over"]),
    ]
    different = len(figures["texts_that_differ"])
    rows.append((f"of {figures['texts']} greedy texts differ", different, "0", not different))
    for name, fds in figures["fds"].items():
        kept = fds["after"] <= fds["before"]
        rows.append((f"{name}: descriptors afterwards", fds["after"], f"{fds['before']}", kept))
    for name, rss in figures["rss_mib"].items():
        most = rss["first"] * MAX_RSS_GROWTH + RSS_NOISE_MIB
        rows.append(
            (f"{name}: RSS at the end, MiB", rss["last"], f"{most:.0f}", rss["last"] <= most)
        )
    for what, key, most in (
        ("p99 TTFT, last / first minute", "ttft_ratio", 1.2),
        ("event loop lag p99, ms", "loop_lag_p99_ms", 50.0),
        ("front-end CPU per token, us", "front_end_us_per_token", MAX_US_PER_TOKEN),
    ):
        rows.append((what, round(figures[key], 2), f"{most:g}", figures[key] <= most))
    return rows


def long_promises(figures: dict[str, Any]) -> list[tuple[str, Any, str, bool]]:
    """The same of the load with long streams."""
    wrong, cost = sum(figures["wrong"].values()), figures["front_end_us_per_token"]
    what = f"front-end CPU per token, {LONG_TOKENS} each, us"
    return [
        (f"unexpected, {LONG_TOKENS} tokens each", wrong, "0", not wrong),
        (what, round(cost, 2), f"{MAX_US_PER_TOKEN:g}", cost <= MAX_US_PER_TOKEN),
    ]


def main() -> int:
    """Prints the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (%(default)s)")
    parser.add_argument("--clients", type=int, default=Plan.clients, help="at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the load (%(default)s)")
    given, port = parser.parse_args(), free_port()
    plan = Plan(given.clients, 60 * given.minutes, seed=given.seed)
    with running("--port", str(port)) as server:
        server.wait_ready()
        pid = server.process.pid
        figures = asyncio.run(soak(plan, pid, port))
        seconds = min(plan.seconds, 60 * LONG_MINUTES)
        long_plan = replace(plan, seconds=seconds, output_tokens=LONG_TOKENS)
        figures["long_streams"] = long = asyncio.run(soak(long_plan, pid, port))
        costs = [cost(pid, port, BEGINNINGS[0]) for _ in range(COST_ROUNDS)]
        errors = [line for line in server.err if "Traceback" in line or "ERROR" in line]
    for name, values in zip(("us_per_further_token", "ms_per_request"), zip(*costs)):
        figures[name] = statistics.median(values)
    rows = promises(figures) + long_promises(long)
    for what, measured, promised, kept in rows:
        print(f"{what:42} {measured!s:>12}  at most {promised:>8}  {'ok' if kept else 'BROKEN'}")
    print(json.dumps(figures | {"errors_in_log": errors[:20]}, indent=2))
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
