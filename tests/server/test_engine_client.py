"""The engine in another process, without a model: requests, readers, queues, connections."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from jaxserve import InvalidRequestError, SamplingParams
from server import wire
from server.engine_client import EngineClient, EngineDeadError, OverloadedError
from server.engine_stream import EngineStream, TokenEvent
from tests.helpers.engine_processes import fake_client
from tests.helpers.fake_runner import naive
from tests.helpers.patience import timeout, until, within

VOCAB = 100
LONG = {"engine": {"num_pages": 2000, "max_model_len": 4000}}
"""An engine with room for long outputs."""


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


async def read(stream: EngineStream) -> tuple[list[int], TokenEvent]:
    """(all tokens, the last event) of a stream."""
    tokens: list[int] = []
    async with stream:
        async for event in stream:
            tokens += event.token_ids
    return tokens, event


async def seconds_until_idle(client: EngineClient) -> float:
    """How long it takes until no request is there and every page is free."""
    began = asyncio.get_running_loop().time()
    while True:
        stats = await client.stats()
        if not (stats["running"] or stats["waiting"] or stats["kv_pages_used"]):
            return asyncio.get_running_loop().time() - began
        await asyncio.sleep(0.01)


async def until_stats(client: EngineClient, **expected: int) -> None:
    """Waits until the engine's counters have these values."""
    async with timeout(1):
        while not expected.items() <= (await client.stats()).items():
            await asyncio.sleep(0.005)


def play(scene: Callable[[EngineClient], Awaitable[None]], **options: Any) -> None:
    """Runs a scene with a client of a fake engine."""

    async def run() -> None:
        async with timeout(60), fake_client(**options) as client:
            await scene(client)

    asyncio.run(run())


def test_tokens_come_as_they_would_in_one_process() -> None:
    async def scene(client: EngineClient) -> None:
        events = [event async for event in client.submit("a", [1, 2, 3], greedy(12))]
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == naive([1, 2, 3], 12, VOCAB)
        assert (events[-1].finish_reason, events[-1].error) == ("length", None)
        assert events[0].num_cached_tokens == 0, "the first event tells"
        seeded = SamplingParams(seed=5, max_tokens=12, stop_token_ids=[naive([1], 9, 100, 5)[6]])
        tokens, last = await read(client.submit("b", [1], seeded))
        assert tokens == naive([1], 12, VOCAB, 5, seeded.stop_token_ids or ())
        assert (last.finish_reason, last.stop_reason) == ("stop", tokens[-1])
        assert client.info is not None
        assert (client.info.model, client.info.vocab_size) == ("fake", VOCAB)
        assert client.startup.stage == "ready"

    play(scene)


def test_a_thousand_small_requests_at_once() -> None:
    async def scene(client: EngineClient) -> None:
        prompts = [[index % VOCAB, index // VOCAB, 1] for index in range(1000)]
        streams = [client.submit("same id", prompt, greedy(4)) for prompt in prompts]
        results = await asyncio.gather(*map(read, streams))
        assert [tokens for tokens, _ in results] == [naive(p, 4, VOCAB) for p in prompts]
        assert await seconds_until_idle(client) < within(1)

    play(scene)


def test_what_cannot_be_served_is_refused_before_it_is_sent() -> None:
    async def scene(client: EngineClient) -> None:
        wrong: list[tuple[str | None, dict[str, Any]]] = [
            ("prompt", {"prompt_token_ids": []}),
            ("prompt", {"prompt_token_ids": [VOCAB]}),
            ("prompt", {"prompt_token_ids": [-1]}),
            ("prompt", {"prompt_token_ids": [True]}),
            ("prompt", {"prompt_token_ids": [1] * 252}),
            ("stop_token_ids", {"params": SamplingParams(stop_token_ids=[VOCAB])}),
            ("logit_bias", {"params": SamplingParams(logit_bias={VOCAB: 1})}),
            (None, {"cache_salt": "\ud800"}),
            (None, {"priority": 2**64}),
        ]
        for param, change in wrong:
            fields = {"prompt_token_ids": [1], "params": greedy(1), **change}
            with pytest.raises(InvalidRequestError) as error:
                client.submit("a", **fields)
            assert error.value.param == param

    play(scene)


def test_what_only_the_engine_refuses_raises_in_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine_client.Limits.check_prompt", lambda *_: None)

    async def scene(client: EngineClient) -> None:
        with pytest.raises(InvalidRequestError, match="prompt holds 100") as error:
            await read(client.submit("a", [VOCAB], greedy(1)))
        assert error.value.param == "prompt"

    play(scene)


def test_bad_logits_are_an_error_of_their_request() -> None:
    async def scene(client: EngineClient) -> None:
        _, last = await read(client.submit("a", [1], greedy(8)))
        assert (last.finish_reason, last.error) == ("error", "The model's logits were not numbers.")
        assert (await read(client.submit("b", [1], greedy(8))))[0] == naive([1], 8, VOCAB)

    play(scene, faults={3: "nan"})


def test_a_full_queue_says_when_to_come_again() -> None:
    async def scene(client: EngineClient) -> None:
        streams = [client.submit(str(i), [i], greedy(200)) for i in range(2 + 3)]
        with pytest.raises(OverloadedError) as error:
            client.submit("too many", [1], greedy(1))
        assert 1 <= error.value.retry_after_s <= 60
        streams[0].abort()
        client.submit("fits now", [1], greedy(1)).abort()
        for stream in streams:
            stream.abort()

    play(scene, engine={"max_rows": 2}, max_queue=3)


def test_who_waits_too_long_is_refused_and_who_runs_is_not() -> None:
    async def scene(client: EngineClient) -> None:
        runs = client.submit("runs", [1], greedy(60))
        waits = client.submit("waits", [2], greedy(1))
        with pytest.raises(OverloadedError):
            await read(waits)
        tokens, last = await read(runs)
        assert (len(tokens), last.finish_reason) == (60, "length")

    play(scene, engine={"max_rows": 1}, queue_timeout_s=0.5, pace="slow")


@pytest.mark.parametrize("stage", ["queued", "prompt", "decoding", "at once"])
def test_an_aborted_request_gives_its_pages_back_within_a_second(stage: str) -> None:
    async def scene(client: EngineClient) -> None:
        other = client.submit("other", [9], greedy(100)) if stage == "queued" else None
        prompt = [1] * 1000 if stage == "prompt" else [1]
        stream = client.submit("a", prompt, greedy(2000))
        if stage == "queued":
            await until_stats(client, waiting=1)
        elif stage == "prompt":
            await until_stats(client, kv_pages_used=250)
        elif stage == "decoding":
            async for event in stream:
                assert event.token_ids
                break
        stream.abort()
        if other is not None:
            other.abort()
        assert await seconds_until_idle(client) < within(1)
        assert [event async for event in stream] == []

    rows = 1 if stage == "queued" else 8
    play(scene, engine={**LONG["engine"], "max_rows": rows}, pace="slow")


def test_leaving_a_stream_early_aborts_its_request() -> None:
    async def scene(client: EngineClient) -> None:
        async with client.submit("a", [1], greedy(2000)) as stream:
            await anext(stream)
        assert await seconds_until_idle(client) < within(1)
        reader = asyncio.create_task(read(client.submit("b", [1], greedy(2000))))
        await asyncio.sleep(0.1)
        reader.cancel()
        await asyncio.wait([reader])
        assert await seconds_until_idle(client) < within(1)
        assert (await client.stats())["finished"] == {"abort": 2}

    play(scene, pace="slow", **LONG)


def test_what_a_slow_reader_has_not_read_is_merged_and_complete() -> None:
    async def scene(client: EngineClient) -> None:
        slow = client.submit("slow", [1], greedy(500))
        await read(client.submit("quick", [2], greedy(600)))
        events = [event async for event in slow]
        assert len(events) == 1
        assert events[0].token_ids == naive([1], 500, VOCAB)
        assert events[0].finish_reason == "length"

    play(scene, **LONG)


def raw_connection(client: EngineClient) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(client._path))
    sock.settimeout(within(10))
    return sock


def last_events(sock: socket.socket, count: int) -> dict[str, list[wire.Event]]:
    """The events by request, read until so many requests have ended."""
    events: dict[str, list[wire.Event]] = {}
    with sock.makefile("rb") as file:
        while count:
            message = wire.decode(file.read(wire.payload_size(file.read(wire.HEADER.size))))
            if not isinstance(message, wire.Events):
                continue
            plain = [wire.Event(*item) for item in message.tokens.items()]
            for event in (*plain, *(wire.Event(*fields) for fields in message.events)):
                events.setdefault(event.request_id, []).append(event)
                count -= event.finish_reason is not None
    return events


def test_a_front_end_that_reads_nothing_delays_nobody_and_loses_nothing() -> None:
    async def scene(client: EngineClient) -> None:
        stuck = raw_connection(client)
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ids = [str(index) for index in range(4)]
        for name in ids:
            params = {"temperature": 0.0, "max_tokens": 1200}
            stuck.sendall(wire.encode(wire.Submit(name, [int(name)], params, "", 0, 60)))
        tokens, _ = await read(client.submit("a", [7], greedy(300)))
        assert tokens == naive([7], 300, VOCAB)
        await seconds_until_idle(client)
        got = await asyncio.to_thread(last_events, stuck, len(ids))
        for name in ids:
            tokens = [token for event in got[name] for token in event.token_ids]
            assert tokens == naive([int(name)], 1200, VOCAB)
            assert len(got[name]) < 1000, "nothing had to wait: this shows nothing"

    play(scene, **LONG)


BAD_FRAMES = {
    "no msgpack": wire.HEADER.pack(4) + b"\xc1\xc1\xc1\xc1",
    "no message": wire.HEADER.pack(1) + b"\x01",
    "empty": wire.HEADER.pack(0),
    "an engine's message": wire.encode(wire.Heartbeat(0, 0, 0, False)),
    "a field of the wrong type": wire.encode(wire.Abort([1])),  # type: ignore[list-item]
    "too large": wire.HEADER.pack(wire.MAX_FRAME_BYTES + 1),
    "larger still": b"\xff" * 64,
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_bad_frame_closes_its_connection_and_no_other(frame: bytes) -> None:
    async def scene(client: EngineClient) -> None:
        bystander = asyncio.create_task(read(client.submit("a", [1], greedy(200))))
        sock = raw_connection(client)
        sock.sendall(wire.encode(wire.Submit("left behind", [1], {"max_tokens": 10**6}, "", 0, 60)))
        sock.sendall(frame)
        with sock.makefile("rb") as file:
            await asyncio.to_thread(file.read)  # to the end
        tokens, _ = await bystander
        assert tokens == naive([1], 200, VOCAB)
        assert await seconds_until_idle(client) < within(1)

    play(scene)


def test_a_front_end_that_goes_in_mid_frame_leaves_nothing_behind() -> None:
    async def scene(client: EngineClient) -> None:
        for length in (2, 40):
            sock = raw_connection(client)
            frame = wire.encode(wire.Submit("a", [1], {"max_tokens": 4000}, "", 0, 60))
            sock.sendall(frame)
            sock.sendall(frame[:length])
            sock.close()
        await asyncio.sleep(0.1)
        assert await seconds_until_idle(client) < within(1)

    play(scene, pace="slow", **LONG)


def test_parameters_that_make_no_sense_end_only_their_request() -> None:
    async def scene(client: EngineClient) -> None:
        sock = raw_connection(client)
        wrong: dict[str, dict[str, Any]] = {
            "unknown": {"no such": 1},
            "range": {"temperature": 9.0},
            "type": {"n": "x"},
        }
        for name, params in wrong.items():
            sock.sendall(wire.encode(wire.Submit(name, [1], params, "", 0, 60)))
        events = await asyncio.to_thread(last_events, sock, 3)
        errors = {name: event.error or [] for name, (event,) in events.items()}
        assert errors["unknown"] == ["failed", "The request could not be admitted.", None]
        assert errors["range"][::2] == ["invalid", "temperature"]
        assert errors["type"][::2] == ["invalid", "n"]
        assert len((await read(client.submit("b", [1], greedy(3))))[0]) == 3

    play(scene)


def test_two_front_ends_share_the_engine_and_nothing_else() -> None:
    async def scene(first: EngineClient) -> None:
        second = EngineClient(first._path)
        await second.start()
        await until(lambda: second.state == "ready", 5)
        streams = [
            client.submit("same id", [index], greedy(50))
            for index in range(20)
            for client in (first, second)
        ]
        results = await asyncio.gather(*map(read, streams))
        assert [tokens for tokens, _ in results] == [
            naive([index], 50, VOCAB) for index in range(20) for _ in range(2)
        ]
        left = second.submit("left behind", [1], greedy(2000))
        kept = first.submit("kept", [2], greedy(200))
        await second.close()
        assert (await read(left))[1].finish_reason == "abort"
        assert (await read(kept))[0] == naive([2], 200, VOCAB)
        assert first.state == "ready"
        assert await seconds_until_idle(first) < within(1)

    play(scene, pace="slow", **LONG)


def test_closing_lets_requests_end_and_takes_no_more() -> None:
    async def scene(client: EngineClient) -> None:
        reader = asyncio.create_task(read(client.submit("a", [1], greedy(60))))
        await asyncio.sleep(0)
        closing = asyncio.create_task(client.close(drain_s=30))
        await asyncio.sleep(0)
        assert client.state == "draining"
        with pytest.raises(EngineDeadError, match="shutting down"):
            client.submit("late", [1], greedy(1))
        tokens, last = await reader
        assert (tokens, last.finish_reason) == (naive([1], 60, VOCAB), "length")
        await closing
        assert client.state == "closed"

    play(scene, pace="slow")


def test_closing_aborts_what_takes_longer() -> None:
    async def scene(client: EngineClient) -> None:
        stream = client.submit("a", [1], greedy(2000))
        began = asyncio.get_running_loop().time()
        await client.close(drain_s=0.3)
        assert asyncio.get_running_loop().time() - began < within(4)
        assert (await read(stream))[1].finish_reason == "abort"

    play(scene, pace="slow", **LONG)


def test_heartbeats_come_every_second_and_tell_the_load() -> None:
    async def scene(client: EngineClient) -> None:
        streams = [client.submit(str(index), [1], greedy(2000)) for index in range(3)]
        before = client.last_heartbeat
        await until(lambda: client.last_heartbeat > before, 3)
        await until(lambda: (client.num_running, client.num_waiting) == (2, 1), 3)
        for stream in streams:
            stream.abort()

    play(scene, engine={**LONG["engine"], "max_rows": 2}, pace="slow")


def test_the_front_end_loads_no_jax() -> None:
    code = (
        "import sys, server.engine_client\n"
        "print(sorted({'jax', 'jaxlib', 'flax', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
