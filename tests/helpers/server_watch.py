"""What a running server uses and has left: memory, descriptors, CPU time, and its own /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.patience import within

LEFT_OVER = ("num_requests_running", "num_requests_waiting", "kv_pages_used", "open_streams")
"""Series that are zero when nobody uses the server."""
QUIET_S = within(5.0)
"""After the last client has left, all of them are zero within this."""


class Usage(NamedTuple):
    """Of one process: resident memory in bytes, and open descriptors."""

    rss: int
    fds: int


class Watch:
    """A server's processes.

    Args:
        pid: of the process that was started: with one front-end, it is the front-end itself.

    Attributes:
        samples: of each process by name, one a second while ``watch`` runs.
    """

    def __init__(self, pid: int) -> None:
        main = psutil.Process(pid)
        names = {"front-end": main}
        for number, child in enumerate(main.children(recursive=True)):
            names[f"engine {number}" if number else "engine"] = child
        self._processes = names
        self.samples: dict[str, list[Usage]] = {name: [] for name in names}

    def usage(self) -> dict[str, Usage]:
        """Of each process, now."""
        return {
            name: Usage(process.memory_info().rss, process.num_fds())
            for name, process in self._processes.items()
        }

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of CPU that the front-end has used so far: its own and the system's for it."""
        times = self._processes["front-end"].cpu_times()
        return float(times.user), float(times.system)

    @contextlib.asynccontextmanager
    async def sampling(self, interval_s: float = 1.0) -> AsyncIterator[None]:
        """Takes samples while the block runs."""

        async def sample() -> None:
            while True:
                for name, usage in self.usage().items():
                    self.samples[name].append(usage)
                await asyncio.sleep(interval_s)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()


def rss_mib(samples: list[Usage], parts: int) -> dict[str, float]:
    """Median of the first and of the last of so many parts, and the most, in MiB."""
    values = [usage.rss / 2**20 for usage in samples]
    size = max(1, len(values) // parts)
    first, last = statistics.median(values[:size]), statistics.median(values[-size:])
    return {"first": round(first, 1), "last": round(last, 1), "most": round(max(values), 1)}


async def scrape(session: aiohttp.ClientSession, url: str) -> defaultdict[str, float]:
    """The sums of /metrics' series by name without the prefix; a bucket is "name_bucket LE", and
    replies are counted as "replies STATUS" too."""
    async with session.get(f"{url}/metrics") as reply:
        text = await reply.text()
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("jaxserve:")
            if "le" in sample.labels:
                name += f" {sample.labels['le']}"
            sums[name] += sample.value
            if "status" in sample.labels and name.endswith("_total"):
                sums[f"replies {sample.labels['status']}"] += sample.value
    return sums


async def left_over(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What isn't zero of LEFT_OVER and /load, after waiting QUIET_S for all of it."""
    for _ in range(int(QUIET_S / 0.1)):
        values = await scrape(session, url)
        async with session.get(f"{url}/load") as reply:
            load = (await reply.json())["server_load"]
        left = {name: values[name] for name in LEFT_OVER} | {"server_load": load}
        if not any(left.values()):
            return {}
        await asyncio.sleep(0.1)
    return {name: value for name, value in left.items() if value}


async def fds_settle(watch: Watch, before: Mapping[str, Usage]) -> dict[str, Usage]:
    """The usage once no process has more descriptors open than before, or after QUIET_S."""
    for _ in range(int(QUIET_S / 0.1)):
        now = watch.usage()
        if all(now[name].fds <= before[name].fds for name in now):
            break
        await asyncio.sleep(0.1)
    return now


def lag_p99_ms(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """99th percentile of the event loop's lag between two scrapes, in ms; see quantile."""
    counts = {
        float(name.split()[1]): count - before[name]
        for name, count in after.items()
        if name.startswith("event_loop_lag_seconds_bucket ")
    }
    return 1e3 * quantile(counts, 0.99)


def quantile(counts: Mapping[float, float], q: float) -> float:
    """A quantile of a histogram, linear within its bucket.

    Args:
        counts: cumulative, by upper bound; infinity is among them.

    Returns:
        infinity if it lies beyond the last finite bound, 0 if nothing was counted.
    """
    pairs = [(0.0, 0.0), *sorted(counts.items())]
    rank = q * pairs[-1][1]
    for (low, below), (high, upto) in pairwise(pairs):
        if upto >= rank > below:
            part = (rank - below) / (upto - below)
            return high if math.isinf(high) else low + (high - low) * part
    return 0.0
