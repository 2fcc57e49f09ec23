"""A mixed load for a server: streams, clients that leave early, and requests to be refused."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

QUESTIONS = (
    "Who are you?",
    "What is a KV page?",
    "Tell me a story about a boat.",
    "Add 12 and 30.",
)
LENGTHS = (16, 64, 128)
"""Of outputs in tokens, at most."""
BEGINNINGS = ("Once upon a time", "The little engine", "In the morning a bird", "A page is")


@dataclass(frozen=True)
class Bad:
    """A request that must be refused with this status."""

    status: int
    path: str = "/v1/completions"
    body: Any = None
    text: str = ""
    kind: str = "application/json"
    method: str = "POST"


BAD = (
    Bad(400, text='{"prompt": "cut o'),
    Bad(400, text="[1, 2, 3]"),
    Bad(400, body={"prompt": "x", "temprature": 1}),
    Bad(400, body={"prompt": "x", "temperature": -1, "stream": True}),
    Bad(400, body={"prompt": "x", "max_tokens": "many"}),
    Bad(400, body={"prompt": [10**9]}),
    Bad(400, body={"prompt": "long " * 20_000}),
    Bad(404, body={"prompt": "x", "model": "none"}),
    Bad(400, "/v1/chat/completions", {"messages": []}),
    Bad(400, "/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}),
    Bad(415, text="prompt=x", kind="application/x-www-form-urlencoded"),
    Bad(404, "/v1/nothing", {}),
    Bad(405, method="GET"),
)


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        seconds: of measured load.
        warm_up_s: of load before that, at least.
        disconnects, bad: shares of all requests.
        output_tokens: of each stream; None leaves it to the model, which soon ends.
        seed: of what each client sends in which order.
    """

    clients: int = 64
    seconds: float = 600.0
    warm_up_s: float = 10.0
    disconnects: float = 0.05
    bad: float = 0.05
    output_tokens: int | None = None
    seed: int = 0


@dataclass
class Tally:
    """What came of the requests that began since ``began``.

    Attributes:
        ttft: (when it began, seconds until the first token) of streams.
        counts: of "whole" and "left" streams and "refused" requests.
        wrong: how often something else than the expected happened.
        texts: by prompt, all that greedy streams answered.
    """

    began: float
    ttft: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    texts: dict[str, set[str]] = field(default_factory=dict)


class Load:
    """The clients. ``tally`` may be replaced while they run."""

    def __init__(self, plan: Plan, url: str, session: aiohttp.ClientSession) -> None:
        self.tally = Tally(time.monotonic())
        self._plan, self._url, self._session = plan, url, session
        self._stop = False
        self._typical_s = 1.0  # how long a stream takes
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(plan.clients)]

    async def stop(self) -> None:
        """Lets all clients end their last request."""
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        plan, rng = self._plan, random.Random(f"{self._plan.seed} {number}")
        while not self._stop:
            draw = rng.random()
            try:
                if draw < plan.bad:
                    await self._refused(rng.choice(BAD))
                else:
                    path, body = self._good(rng)
                    # Squared, so that many leave before their first token.
                    leave = rng.random() ** 2 if draw < plan.bad + plan.disconnects else None
                    await self._stream(path, body, leave)
            except (aiohttp.ClientError, OSError) as error:
                self.tally.wrong[f"{type(error).__name__}: {error}"] += 1

    def _good(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """A path and a body."""
        body: dict[str, Any] = {"stream": True}
        body |= {"temperature": rng.choice((0, 1)), "max_tokens": rng.choice(LENGTHS)}
        if self._plan.output_tokens is not None:
            body |= {"max_tokens": self._plan.output_tokens, "ignore_eos": True}
        if rng.random() < 0.5:
            return "/v1/completions", {**body, "prompt": rng.choice(BEGINNINGS)}
        messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
        return "/v1/chat/completions", {**body, "messages": messages}

    async def _refused(self, bad: Bad) -> None:
        tally, data = self.tally, bad.text or json.dumps(bad.body)
        options = {"data": data, "headers": {"Content-Type": bad.kind}}
        async with self._session.request(bad.method, self._url + bad.path, **options) as reply:
            text = await reply.text()
        tally.counts["refused"] += 1
        if reply.status != bad.status or "error" not in json.loads(text):
            tally.wrong[f"{reply.status} for {bad.path} {data[:60]}"] += 1

    async def _stream(self, path: str, body: dict[str, Any], leave: float | None) -> None:
        """A stream; ``leave`` is after what part of the usual time the client is gone."""
        tally, began, data = self.tally, time.monotonic(), bytearray()
        try:
            async with (
                asyncio.timeout(None if leave is None else leave * self._typical_s),
                self._session.post(self._url + path, json=body) as reply,
            ):
                if reply.status != 200:
                    tally.wrong[f"{reply.status} for a stream: {await reply.text()}"] += 1
                    return
                async for chunk in reply.content.iter_any():
                    if not data:  # the first event brings the first token
                        tally.ttft.append((began, time.monotonic() - began))
                    data += chunk
        except TimeoutError:
            tally.counts["left"] += 1
            return
        self._typical_s += 0.05 * (time.monotonic() - began - self._typical_s)
        tally.counts["whole"] += 1
        events = bytes(data).decode().removesuffix("\n\n").split("\n\n")
        if events.pop() != "data: [DONE]" or any('"error"' in event for event in events):
            tally.wrong[f"a stream ended with {events[-1]}"] += 1
        elif body["temperature"] == 0:
            tally.texts.setdefault(json.dumps([path, body]), set()).add(_text(events))


def _text(events: list[str]) -> str:
    """The text of a stream's events."""
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    return "".join(one["text"] if "text" in one else one["delta"]["content"] for one in choices)
