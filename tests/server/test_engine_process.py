"""The engine's process with the demo model: what comes through the socket is what ``LLM`` gives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jaxserve import LLM, EngineConfig, InvalidRequestError, SamplingParams
from server import wire
from server.engine_client import EngineClient, Startup
from server.engine_supervisor import EngineProcess
from tests.helpers.patience import until, within
from tests.server.test_engine_client import read

SETTINGS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "enforce_eager": True,
}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2),
    SamplingParams(seed=3, max_tokens=16, repetition_penalty=1.3, logit_bias={300: 2.0}),
    SamplingParams(seed=4, max_tokens=16, prompt_logprobs=1),
]
PROMPTS = [[5, 6, 7], [300, 301], [400, 401, 402, 403]]


@pytest.fixture(scope="module")
def wanted() -> Iterator[list[Any]]:
    """What the engine gives inside one process."""
    with LLM(use_tqdm=False, **SETTINGS) as llm:
        yield llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def test_a_model_behind_the_socket_gives_what_it_gives_without_one(wanted: list[Any]) -> None:
    stages: list[Startup] = []

    async def scene() -> None:
        process = EngineProcess(EngineConfig(**SETTINGS))
        client = EngineClient(process)
        take = client._take
        stages.append(client.startup)

        def note(message: wire.Message) -> None:
            take(message)
            if client.state != "ready":
                stages.append(client.startup)

        client._take = note  # type: ignore[method-assign]
        await client.start()
        try:
            while client.state != "ready":
                await asyncio.sleep(0.005)
            await check_tokens(client, wanted)
            await check_embeddings(client)
            stats = await client.stats()
            assert stats["generation_tokens"] > 0
            assert (stats["kv_pages_used"], stats["kv_pages_total"] > 0) == (0, True)
            await check_sigterm(client, process)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(scene(), within(120)))
    names = list(dict.fromkeys(startup.stage for startup in stages))
    assert names[0] == "process"
    assert set(names) <= {"process", "checkpoint", "device", "weights", "allocating"}
    assert any(startup.total > 0 for startup in stages if startup.stage == "weights")


async def check_tokens(client: EngineClient, wanted: list[Any]) -> None:
    info = client.info
    assert info is not None
    assert (info.model, info.max_model_len, info.max_num_seqs) == ("jaxserve-demo", 128, 4)
    streams = [client.submit("a", ids, params) for ids, params in zip(PROMPTS, PARAMS)]
    results = await asyncio.gather(*map(read, streams))
    for (tokens, last), output in zip(results, wanted, strict=True):
        (completion,) = output.outputs
        assert (tokens, last.finish_reason) == (completion.token_ids, completion.finish_reason)
    async with client.submit("b", PROMPTS[0], PARAMS[0]) as stream:
        entries = [one async for event in stream for one in event.logprobs or ()]
    for entry, expected in zip(entries, wanted[0].outputs[0].logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected[entry.token_id].logprob, abs=1e-5)
        assert {token for token, _ in entry.top} <= expected.keys()
    async with client.submit("c", PROMPTS[2], PARAMS[2]) as stream:
        first = await anext(stream)
    assert first.prompt_logprobs is not None
    assert [entry.token_id for entry in first.prompt_logprobs] == PROMPTS[2][1:]


async def check_embeddings(client: EngineClient) -> None:
    one, same, other, mean = await asyncio.gather(
        client.embed("1", [5, 6, 7], "last"),
        client.embed("2", [5, 6, 7], "last"),
        client.embed("3", [5, 6, 8], "last"),
        client.embed("4", [5, 6, 7], "mean"),
    )
    assert sum(value * value for value in one) == pytest.approx(1, abs=1e-4)
    assert one == pytest.approx(same, abs=1e-5)
    assert one != pytest.approx(other, abs=1e-3)
    assert one != pytest.approx(mean, abs=1e-3)
    with pytest.raises(InvalidRequestError) as error:
        await client.embed("5", [5], "max")
    assert error.value.param == "pooling"


async def check_sigterm(client: EngineClient, process: EngineProcess) -> None:
    """It ends at once, in the midst of a request, and is started again like after any end."""
    assert process.pid is not None
    stream = client.submit("d", [5], SamplingParams(max_tokens=100, ignore_eos=True))
    await anext(stream)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert (await read(stream))[1].finish_reason == "error"
    await until(lambda: process.pid is None, 2)
    assert time.monotonic() - began < within(2)
