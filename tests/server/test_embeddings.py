"""/v1/embeddings is bounded like generation: in its queue, in time, and when clients leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.engine_client import EngineClient
from tests.helpers.engine_processes import fake_client
from tests.helpers.patience import timeout, until, within
from tests.helpers.serving import Front, front_end
from tests.server.test_engine_client import LONG, greedy, read, seconds_until_idle

PATH = "/v1/embeddings"


def play(scene: Callable[[Front, EngineClient], Awaitable[None]], **options: Any) -> None:
    """Runs a scene with a front-end before a process with a fake engine."""

    async def run() -> None:
        async with timeout(60), fake_client(pace="slow", **options) as client:
            most = options.get("max_queue", 1024)
            async with front_end(client, tokenizer=False, max_queue=most) as front:  # type: ignore[arg-type]
                await scene(front, client)

    asyncio.run(run())


def test_each_input_gets_its_own_vector() -> None:
    async def scene(front: Front, client: EngineClient) -> None:
        inputs = [[index + 1] * (index + 1) for index in range(20)]
        _, reply = await front.post(PATH, {"input": inputs, "pooling": "mean"})
        for ids, entry in zip(inputs, reply["data"], strict=True):
            total = sum(ids) / len(ids)
            length = (total**2 + 1) ** 0.5
            assert entry["embedding"] == pytest.approx([total / length, 1 / length], abs=1e-6)
        assert reply["usage"]["prompt_tokens"] == sum(map(len, inputs))

    play(scene)


def test_a_full_queue_is_429_and_nothing_of_the_request_stays_behind() -> None:
    async def scene(front: Front, client: EngineClient) -> None:
        runs = client.submit("runs", [1], greedy(1000))
        first = asyncio.create_task(front.post(PATH, {"input": [[1]] * 3}))
        await until(lambda: client._num_embedding == 3)
        status, reply, headers = await front.request("POST", PATH, {"input": [[1]] * 3})
        assert (status, reply["error"]["code"]) == (429, "overloaded")
        assert int(headers["Retry-After"]) >= 1
        runs.abort()
        assert (await first)[0] == 200
        assert await seconds_until_idle(client) < within(1)

    play(scene, engine={**LONG["engine"], "max_rows": 1}, max_queue=4)


def test_more_inputs_than_the_queue_could_take_are_refused_for_good() -> None:
    async def scene(front: Front, client: EngineClient) -> None:
        status, reply = await front.post(PATH, {"input": [[1]] * 5})
        assert (status, reply["error"]["param"]) == (400, "input")

    play(scene, max_queue=4)


def test_who_waits_too_long_gets_503() -> None:
    async def scene(front: Front, client: EngineClient) -> None:
        stream = client.submit("runs", [1], greedy(100))
        status, reply, headers = await front.request("POST", PATH, {"input": [1, 2]})
        assert (status, reply["error"]["code"]) == (503, "queue_timeout")
        assert int(headers["Retry-After"]) >= 1
        assert len((await read(stream))[0]) == 100

    play(scene, engine={"max_rows": 1}, queue_timeout_s=0.5)


def test_a_client_that_leaves_frees_the_engine() -> None:
    async def scene(front: Front, client: EngineClient) -> None:
        stream = client.submit("runs", [1], greedy(1000))
        task = asyncio.create_task(front.post(PATH, {"input": [[1, 2]] * 3}))
        await until(lambda: client.num_waiting == 3, 3)
        assert (await front.get("/load"))[1] == {"server_load": 1}
        task.cancel()
        await until(lambda: client.num_waiting == 0, 3)
        assert (await front.get("/load"))[1] == {"server_load": 0}
        stream.abort()
        assert await seconds_until_idle(client) < within(1)

    play(scene, engine={**LONG["engine"], "max_rows": 1})


def test_a_shutdown_lets_embeddings_end() -> None:
    async def scene(front: Front, client: EngineClient) -> None:
        stream = client.submit("runs", [1], greedy(30))
        task = asyncio.create_task(front.post(PATH, {"input": [[1, 2], [3]]}))
        await until(lambda: client._num_embedding == 2)
        await read(stream)
        await client.close(drain_s=20)
        status, reply = await task
        assert (status, len(reply["data"])) == (200, 2)

    play(scene, engine={"max_rows": 1})
