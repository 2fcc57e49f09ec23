"""Load on a running server, and what each request saw. The keys of the results are vLLM's.

Times are in seconds where they are taken and in milliseconds in the results. A chunk of a stream is
one token unless the server merged some; TPOT counts tokens, ITL counts chunks.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from tqdm.auto import tqdm

from jaxserve.bench.workload import Item
from jaxserve.errors import ConfigError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
MAX_TIMEOUT_S = 6 * 3600.0


@dataclass
class Outcome:
    """What came of one request.

    Attributes:
        prompt_len: tokens sent.
        output_len: tokens that came, as the server counts them; chunks if it doesn't.
        start: on the clock of ``time.perf_counter``.
        ttft: until the first chunk.
        itl: between chunks.
        latency: until the end.
        error: why it failed; empty if it didn't.
    """

    prompt_len: int
    start: float
    output_len: int = 0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    error: str = ""

    def milliseconds(self, metric: str) -> list[float]:
        """The request's values of a metric of ``METRICS``; one-token answers have no TPOT."""
        if metric == "itl":
            return [1e3 * gap for gap in self.itl]
        if metric == "tpot":
            rest = self.output_len - 1
            return [1e3 * (self.latency - self.ttft) / rest] if rest > 0 else []
        return [1e3 * (self.ttft if metric == "ttft" else self.latency)]


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Attributes:
        url: of the route.
        model: its name in requests.
        headers: of each request, a key for example.
        body: more fields of each request, sampling for example.
    """

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)

    def request(self, prompt: str | list[int], output_len: int) -> dict[str, Any]:
        """The JSON of one request; a prompt of the chat route is a text."""
        if self.url.endswith("/chat/completions"):
            what: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            what = {"prompt": prompt}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "max_tokens": output_len, **what, **usage, **self.body}


def arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds from the start to each request.

    Args:
        count: of requests.
        rate: requests per second on average; infinite sends all at once.
        burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes
            in bursts, more is steadier.

    Raises:
        ConfigError: the rate or the burstiness isn't positive.
    """
    if not (rate > 0 and burstiness > 0):
        raise ConfigError("request_rate and burstiness must be positive.")
    if math.isinf(rate):
        return [0.0] * count
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


async def drive(
    target: Target,
    items: Sequence[Item],
    times: Sequence[float],
    prompts: Sequence[str] | None = None,
    max_concurrency: int | None = None,
    use_tqdm: bool = False,
) -> tuple[list[Outcome], float]:
    """Sends each request at its time, or later when too many run.

    Args:
        target: where to.
        items: what to ask.
        times: of ``arrivals``.
        prompts: texts instead of the items' token ids.
        max_concurrency: most requests on the way.
        use_tqdm: show a bar of finished requests.

    Returns:
        The outcomes in the items' order, and the seconds from the first to the last.
    """
    room = asyncio.Semaphore(max_concurrency or len(items) or 1)
    timeout = aiohttp.ClientTimeout(total=MAX_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()
        with tqdm(total=len(items), unit="req", disable=not use_tqdm) as bar:

            async def one(item: Item, prompt: Any, when: float) -> Outcome:
                await asyncio.sleep(start + when - time.perf_counter())
                async with room:
                    outcome = await ask(session, target, item, prompt)
                bar.update()
                return outcome

            texts: Sequence[Any] = prompts or [item.prompt for item in items]
            outcomes = await asyncio.gather(*map(one, items, texts, times))
        return outcomes, time.perf_counter() - start


async def ask(session: aiohttp.ClientSession, target: Target, item: Item, prompt: Any) -> Outcome:
    """Sends one request and takes the times of its chunks. Failures are told by the outcome."""
    outcome = Outcome(len(item.prompt), time.perf_counter())
    body = json.dumps(target.request(prompt, item.output_len))
    headers = {"Content-Type": "application/json", **target.headers}
    last = outcome.start
    try:
        async with session.post(target.url, data=body, headers=headers) as reply:
            if reply.status != 200:
                outcome.error = f"{reply.status}: {(await reply.text())[:200]}"
                return outcome
            async for chunk in _chunks(reply):
                now = time.perf_counter()
                if "error" in chunk:
                    outcome.error = str(chunk["error"])
                    return outcome
                if chunk.get("usage"):
                    outcome.output_len = chunk["usage"]["completion_tokens"]
                if not chunk.get("choices"):
                    continue
                if outcome.ttft:
                    outcome.itl.append(now - last)
                else:
                    outcome.ttft = now - outcome.start
                last = now
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TimeoutError) as error:
        outcome.error = repr(error)
    if not outcome.ttft and not outcome.error:
        outcome.error = "the stream ended without a chunk"
    outcome.latency = last - outcome.start
    outcome.output_len = outcome.output_len or len(outcome.itl) + 1
    return outcome


async def _chunks(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.content:
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)


# --- Results --------------------------------------------------------------------------------------


def summarize(
    outcomes: Sequence[Outcome],
    seconds: float,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of a run under vLLM's keys.

    Args:
        outcomes: of ``drive``.
        seconds: that they took.
        percentiles: of the metrics, 50 is the median.
        goodput: metric -> milliseconds; requests within all of them count for
            ``request_goodput``, per second.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    inputs, outputs = (sum(getattr(o, f"{w}_len") for o in good) for w in ("prompt", "output"))
    results: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "request_goodput": None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_concurrent_requests": most_at_once(good),
    }
    if goodput:
        within = [o for o in good if _meets(o, goodput)]
        results["request_goodput"] = len(within) / seconds
    for metric in METRICS:
        values = [value for outcome in good for value in outcome.milliseconds(metric)] or [0.0]
        results[f"mean_{metric}_ms"] = float(np.mean(values))
        results[f"median_{metric}_ms"] = float(np.median(values))
        results[f"std_{metric}_ms"] = float(np.std(values))
        for percentile, value in zip(percentiles, np.percentile(values, list(percentiles))):
            results[f"p{percentile:g}_{metric}_ms"] = float(value)
    return results


def _meets(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    # A one-token answer has no time per output token to miss.
    return all(
        value <= limit
        for metric, limit in goodput.items()
        for value in outcome.milliseconds(metric)
    )


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The largest number of requests that were on the way at the same time."""
    changes = [(o.start, 1) for o in outcomes] + [(o.start + o.latency, -1) for o in outcomes]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def details(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """What each request saw, under vLLM's keys; times in seconds."""
    return {
        "input_lens": [outcome.prompt_len for outcome in outcomes],
        "output_lens": [outcome.output_len for outcome in outcomes],
        "start_times": [outcome.start for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def text(results: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The figures as vLLM's table."""
    rows = [
        ("Successful requests:", results["completed"]),
        ("Failed requests:", results["failed"]),
        ("Benchmark duration (s):", results["duration"]),
        ("Total input tokens:", results["total_input_tokens"]),
        ("Total generated tokens:", results["total_output_tokens"]),
        ("Request throughput (req/s):", results["request_throughput"]),
        ("Request goodput (req/s):", results["request_goodput"]),
        ("Output token throughput (tok/s):", results["output_throughput"]),
        ("Total token throughput (tok/s):", results["total_token_throughput"]),
        ("Peak concurrent requests:", results["max_concurrent_requests"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [_row(*row) for row in rows if row[1] is not None]
    for metric in metrics:
        lines.append(f"{METRICS[metric]:-^50}")
        wanted = ["mean", "median", *(f"p{percentile:g}" for percentile in percentiles)]
        for name in wanted:
            label = f"{name.capitalize()} {metric.upper()} (ms):"
            lines.append(_row(label, results[f"{name}_{metric}_ms"]))
    return "\n".join([*lines, "=" * 50])


def _row(label: str, value: float) -> str:
    return f"{label:<40} {value if isinstance(value, int) else format(value, '.2f'):<9}".rstrip()
