"""Streams, overload, and clients that leave or stall."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest

from server.engine_client import QueueTimeoutError
from tests.helpers.fake_engine_client import FakeEngineClient
from tests.helpers.patience import until
from tests.helpers.serving import front_end, parse_events, story

ENDLESS = {"prompt": "Hi", "max_tokens": 2000, "temperature": 0}


def slow_engine(**options: Any) -> FakeEngineClient:
    return FakeEngineClient(list(story()), step_s=0.005, **options)


def test_a_full_queue_is_429_and_health_stays_200() -> None:
    async def main() -> None:
        async with front_end(slow_engine(capacity=2)) as front:
            tasks = [asyncio.create_task(front.post("/v1/completions", ENDLESS)) for _ in range(2)]
            await until(lambda: len(front.engine.live) == 2)
            for stream in (False, True):
                body = {**ENDLESS, "stream": stream, "n": 2, "temperature": 1}
                status, reply, headers = await front.request("POST", "/v1/completions", body)
                assert (status, reply["error"]["code"]) == (429, "overloaded")
                assert headers["Retry-After"] == "3"
            assert (await front.get("/health"))[0] == 200
            assert (await front.get("/load"))[1] == {"server_load": 2}
            for task in tasks:
                task.cancel()
            await until(lambda: not front.engine.live)

    asyncio.run(main())


def test_part_of_a_request_never_stays_behind_when_the_queue_is_full() -> None:
    async def main() -> None:
        async with front_end(slow_engine(capacity=3)) as front:
            body = {**ENDLESS, "n": 5, "temperature": 1}
            assert (await front.post("/v1/completions", body))[0] == 429
            assert not front.engine.live

    asyncio.run(main())


def test_more_completions_than_the_queue_could_take_are_refused_for_good() -> None:
    async def main() -> None:
        async with front_end(max_queue=8) as front:
            body = {"prompt": ["a"] * 5, "n": 2}
            assert (await front.post("/v1/completions", body))[0] == 400

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_waiting_too_long_in_the_queue_is_503(stream: bool) -> None:
    async def main() -> None:
        async with front_end() as front:
            front.engine.queue_error = QueueTimeoutError("It waited too long.", 4)
            body = {**ENDLESS, "stream": stream}
            status, reply, headers = await front.request("POST", "/v1/completions", body)
            assert (status, reply["error"]["code"]) == (503, "queue_timeout")
            assert headers["Retry-After"] == "4"

    asyncio.run(main())


@pytest.mark.parametrize(
    "extra",
    [{}, {"stream": True}, {"n": 4, "temperature": 1}, {"prompt": ["a", "b"], "stream": True}],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_client_that_leaves_frees_the_engine(extra: dict[str, Any], frozen: bool) -> None:
    """While it decodes, and while nothing has come yet."""

    async def main() -> None:
        async with front_end(slow_engine()) as front:
            front.engine.frozen = frozen
            task = asyncio.create_task(front.post("/v1/completions", {**ENDLESS, **extra}))
            await until(lambda: front.engine.live)
            await asyncio.sleep(0.02)
            task.cancel()
            await until(lambda: not front.engine.live, 1.0)
            _, text = await front.get("/metrics")
            assert 'finished_reason="abort"' in text

    asyncio.run(main())


def test_a_reader_that_stalls_is_cut_off() -> None:
    async def main() -> None:
        engine = FakeEngineClient(list(story()))
        async with front_end(engine, write_timeout_s=0.2) as front:
            _, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=2**10)
            body = {**ENDLESS, "prompt": ["Hi"] * 60, "max_tokens": 2000, "stream": True}
            data = json.dumps({**body, "logprobs": 20}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            await until(lambda: engine.live, 5)
            await until(lambda: not engine.live, 10)
            _, text = await front.get("/metrics")
            assert 'route="/v1/completions",status="499"' in text
            writer.close()

    asyncio.run(main())


def test_a_failure_in_a_stream_is_an_event_before_the_end() -> None:
    async def main() -> None:
        async with front_end() as front:
            front.engine.fail_after = 3
            events = await front.events("/v1/completions", ENDLESS)
            assert events[-1] == "[DONE]"
            assert events[-2]["error"]["type"] == "server_error"
            assert not front.engine.live

    asyncio.run(main())


def test_silence_in_a_stream_is_filled_with_comments() -> None:
    async def main() -> None:
        async with front_end(stream_ping_s=0.02) as front:
            front.engine.frozen = True
            url = f"{front.url}/v1/completions"
            body = {"prompt": "Hi", "max_tokens": 3, "temperature": 0, "stream": True}
            async with front.session.post(url, json=body) as reply:
                assert await reply.content.readline() == b": keep-alive\n"
                front.engine.frozen = False
                rest = (await reply.text()).removeprefix("\n")
            assert len(parse_events(rest)) >= 2
            assert reply.headers["X-Accel-Buffering"] == "no"
            assert reply.headers["Cache-Control"] == "no-cache"

    asyncio.run(main())


def test_usage_in_every_chunk() -> None:
    async def main() -> None:
        async with front_end() as front:
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = {"prompt": "Hi", "max_tokens": 5, "stream_options": options}
            events = (await front.events("/v1/completions", body))[:-1]
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts) and counts[-1] == 5
            assert events[-1]["choices"] == []

    asyncio.run(main())


@pytest.mark.parametrize(("accept", "end"), [("*/*", "\0"), ("application/x-ndjson", "\n")])
def test_the_legacy_generate_streams_whole_texts(accept: str, end: str) -> None:
    async def main() -> None:
        async with front_end() as front:
            body = {"prompt": "Hi", "max_tokens": 8, "temperature": 0, "stop": ["zzz"]}
            _, whole = await front.post("/generate", body)
            assert whole["text"][0].startswith("Hi")
            url, headers = f"{front.url}/generate", {"Accept": accept}
            async with front.session.post(url, json={**body, "stream": True}, headers=headers) as r:
                text = await r.text()
            pieces = [json.loads(piece)["text"][0] for piece in text.split(end)[:-1]]
            assert text.endswith(end) and pieces[-1] == whole["text"][0]
            assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))

    asyncio.run(main())
