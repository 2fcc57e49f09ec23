"""Streams, overload, and clients that leave or stall."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from jaxserve.tokenizer import FastTextStream
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


async def raw_reply(port: int, body: dict[str, Any], version: str, pause_s: float = 0) -> bytes:
    """What comes back on a connection of its own, read by 2 KiB with pauses."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=2**11)
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    got = b""
    while piece := await reader.read(2048):
        got += piece
        await asyncio.sleep(pause_s)
    writer.close()
    return got


def test_a_slow_reader_gets_every_token_once() -> None:
    """Its buffers are small, so that some tokens are written as they come, others wait for it."""

    async def main() -> None:
        engine = FakeEngineClient(list(story()))
        async with front_end(engine, send_buffer=4096) as front:
            body = {**ENDLESS, "max_tokens": 600, "return_token_ids": True}
            _, whole = await front.post("/v1/completions", body)
            reply = await raw_reply(front.port, body, "1.0", pause_s=0.002)
            head, _, text = reply.decode().partition("\r\n\r\n")
            assert "chunked" not in head
            choices = [event["choices"][0] for event in parse_events(text)[:-1]]
            ids = [token for choice in choices for token in choice["token_ids"]]
            assert ids == whole["choices"][0]["token_ids"]
            assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
            assert max(len(choice["token_ids"]) for choice in choices[1:]) > 1, "nothing waited"
            assert min(len(choice["token_ids"]) for choice in choices[1:-1]) == 1, "all waited"

    asyncio.run(main())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_streams_are_framed_as_the_client_knows_it(version: str) -> None:
    async def main() -> None:
        async with front_end() as front:
            body = {**ENDLESS, "max_tokens": 20}
            head, _, text = (await raw_reply(front.port, body, version)).partition(b"\r\n\r\n")
            chunked = b"Transfer-Encoding: chunked" in head
            assert chunked == (version == "1.1")
            data = b""
            while chunked:
                size, _, text = text.partition(b"\r\n")
                data += text[: int(size, 16)]
                assert text[int(size, 16) :][:2] == b"\r\n"
                text, chunked = text[int(size, 16) + 2 :], size != b"0"
            events = parse_events((data or text).decode())
            _, whole = await front.post("/v1/completions", body)
            texts = [event["choices"][0]["text"] for event in events[:-1]]
            assert "".join(texts) == whole["choices"][0]["text"] and len(texts) > 10

    asyncio.run(main())


@pytest.mark.parametrize("extra", [{}, {"return_token_ids": True}, {"logprobs": 2}])
@pytest.mark.parametrize("stop", [None, "engine"])
def test_a_stream_interval_makes_fewer_chunks_of_the_same_text(
    extra: dict[str, Any], stop: str | None
) -> None:
    """Asked for by the request, or by the server's setting."""

    async def main() -> None:
        body = {**ENDLESS, "max_tokens": 42, "stop": stop, **extra}
        async with front_end() as front:
            every = await front.events("/v1/completions", body)
            few = await front.events("/v1/completions", {**body, "stream_interval": 10})
        async with front_end(stream_interval=10) as front:
            for_all = await front.events("/v1/completions", body)
            overruled = await front.events("/v1/completions", {**body, "stream_interval": 1})
        assert [shape(events) for events in (for_all, overruled)] == [shape(few), shape(every)]
        assert len(shape(few)) <= 6 and len(shape(every)) >= 30
        for events in (few, every):
            last = events[-2]["choices"][0]
            assert last["finish_reason"] == ("stop" if stop else "length")
        assert "".join(shape(few)) == "".join(shape(every))

    def shape(events: list[Any]) -> list[str]:
        return [event["choices"][0]["text"] for event in events[:-1]]

    asyncio.run(main())


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream_options", [None, {"include_usage": True}])
def test_chunks_between_the_first_and_the_last_differ_in_their_text_alone(
    route: str, stream_options: dict[str, Any] | None
) -> None:
    async def main() -> None:
        async with front_end(slow_engine()) as front:
            body = {"max_tokens": 60, "temperature": 0, "stream_options": stream_options}
            begin = [{"role": "user", "content": 'Say "\\n"'}]
            body |= {"prompt": "Hi"} if route == "completions" else {"messages": begin}
            events = (await front.events(f"/v1/{route}", body))[:-1]
            events = [event for event in events if event["choices"]]
            texts, others = [], []
            for event in events[2:-1]:
                (choice,) = event["choices"]
                holder = choice if route == "completions" else choice["delta"]
                texts.append(holder.pop("text" if route == "completions" else "content"))
                others.append(event)
            assert len(texts) > 10 and all(texts) and "🙂" in "".join(texts)
            assert all(event == others[0] for event in others)
            assert ("usage" in others[0]) == (stream_options is not None)
            assert others[0]["choices"][0]["finish_reason"] is None

    asyncio.run(main())


@pytest.mark.parametrize("stop", ["never", "page by"])
def test_a_stop_string_ends_a_stream_and_its_request(stop: str) -> None:
    async def main() -> None:
        async with front_end(slow_engine()) as front:
            body = {**ENDLESS, "max_tokens": 100, "stop": ["zzz", stop]}
            _, whole = await front.post("/v1/completions", body)
            choices = [e["choices"][0] for e in (await front.events("/v1/completions", body))[:-1]]
            assert "".join(one["text"] for one in choices) == whole["choices"][0]["text"]
            ends = [one["finish_reason"] for one in choices]
            assert ends[-1] == whole["choices"][0]["finish_reason"] and not any(ends[:-1])
            assert choices[-1]["stop_reason"] == whole["choices"][0]["stop_reason"]
            assert not front.engine.live
            _, text = await front.get("/metrics")
            assert 'finished_reason="abort"' not in text

    asyncio.run(main())


def test_a_text_that_cannot_be_made_ends_its_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = FastTextStream.feed

    def fails_at_the_ninth(self: FastTextStream, token_id: int) -> str:
        counts[self] += 1
        if len(counts) == 1 and counts[self] == 9:
            raise ValueError("no such token")
        return feed(self, token_id)

    counts: Counter[FastTextStream] = Counter()
    monkeypatch.setattr(FastTextStream, "feed", fails_at_the_ninth)

    async def main() -> None:
        async with front_end(slow_engine()) as front:
            events = await front.events("/v1/completions", ENDLESS)
            assert events[-2]["error"]["code"] and events[-1] == "[DONE]"
            assert len(events) < 15 and "no such token" not in str(events)
            assert not front.engine.live
            assert (await front.post("/v1/completions", {**ENDLESS, "max_tokens": 20}))[0] == 200

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
