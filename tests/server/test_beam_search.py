"""Beam search over HTTP: the search of ``jaxserve.beam_search``, with requests as its rounds."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxserve import LLM
from jaxserve.beam_search import BeamSearchParams, BeamSearchSequence, beam_search
from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput
from jaxserve.sampling.params import SamplingParams
from server.engine_client import QueueTimeoutError
from tests.helpers.fake_engine_client import VOCAB, FakeEngineClient, next_logprobs
from tests.helpers.patience import timeout, until
from tests.helpers.serving import demo_tokenizer, front_end, story
from tests.server.running import ask, free_port, running

BEAMS = {"use_beam_search": True, "n": 3, "max_tokens": 6, "return_token_ids": True}
ENDLESS = {"prompt": "Hi", "use_beam_search": True, "n": 3, "max_tokens": 2000}
ENDS = tuple(range(0, VOCAB, 3))
"""So many end tokens that most searches meet some."""


def ending_engine(**options: Any) -> FakeEngineClient:
    engine = FakeEngineClient(list(story()), **options)
    assert engine.info is not None
    engine.info = dataclasses.replace(engine.info, eos_token_ids=ENDS)
    return engine


def offline(prompt: list[int], **settings: Any) -> list[BeamSearchSequence]:
    """What the search finds for the fake engine without a server."""
    engine = FakeEngineClient(list(story()))

    def generate(prompts: list[dict], params: SamplingParams) -> list[RequestOutput]:
        assert params.logprobs is not None
        outputs = []
        for one in prompts:
            ids = one["prompt_token_ids"]
            top = next_logprobs(engine.tokens(ids, params, 1)[0], params.logprobs).top
            entries = {token: Logprob(value, rank, None) for rank, (token, value) in enumerate(top)}
            outputs.append(RequestOutput("", None, ids, [CompletionOutput(0, logprobs=[entries])]))
        return outputs

    params = BeamSearchParams(**settings)
    return beam_search([(prompt, "")], params, generate, 2048, ENDS)[0].sequences


def run_with(scene: Callable[[Any], Any], engine: FakeEngineClient | None = None) -> None:
    async def main() -> None:
        async with front_end(engine) as front:
            await scene(front)

    asyncio.run(main())


# --- what is found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"length_penalty": 0.0},
        {"length_penalty": -2},
        {"ignore_eos": True},
        {"include_stop_str_in_output": True},
    ],
)
def test_several_prompts_get_what_the_search_finds_for_each(settings: dict[str, Any]) -> None:
    prompts = [[5, 6, 7], [8], list(range(100, 140))]

    async def scene(front: Any) -> None:
        body = {"prompt": prompts, **BEAMS, **settings}
        status, reply = await front.post("/v1/completions", body)
        assert status == 200, reply
        found = [offline(ids, beam_width=3, max_tokens=6, **settings) for ids in prompts]
        pairs = [(ids, one) for ids, beams in zip(prompts, found) for one in beams]
        choices = reply["choices"]
        assert [one["index"] for one in choices] == list(range(9))
        for (ids, sequence), choice in zip(pairs, choices, strict=True):
            output = sequence.tokens[len(ids) :]
            assert choice["token_ids"] == output
            assert demo_tokenizer().decode(sequence.tokens).endswith(choice["text"])
            assert choice["finish_reason"] == sequence.finish_reason
            assert choice["stop_reason"] is None
        count = sum(len(one["token_ids"]) for one in choices)
        usage = reply["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (44, count)
        reasons = {one["finish_reason"] for one in choices}
        assert "length" in reasons if "ignore_eos" in settings else "stop" in reasons
        assert not front.engine.live

    run_with(scene, ending_engine())


def test_best_of_is_the_width_and_n_the_number_of_choices() -> None:
    wanted = offline([5, 6], beam_width=5, max_tokens=6)

    async def scene(front: Any) -> None:
        body = {"prompt": [5, 6], **BEAMS, "n": 2, "best_of": 5}
        _, reply = await front.post("/v1/completions", body)
        tokens = [choice["token_ids"] for choice in reply["choices"]]
        assert tokens == [one.tokens[2:] for one in wanted[:2]]
        texts = [choice["text"] for choice in reply["choices"]]
        body = {"prompt": "Hi", "use_beam_search": True, "n": 2, "best_of": 5, "max_tokens": 6}
        _, legacy = await front.post("/generate", body)
        _, reply = await front.post("/v1/completions", body)
        assert legacy["text"] == ["Hi" + choice["text"] for choice in reply["choices"]]
        assert len(texts) == len(legacy["text"]) == 2

    run_with(scene, ending_engine())


@pytest.mark.parametrize("asked", [0, 2, 12])
def test_log_probabilities_add_up_to_the_score(asked: int) -> None:
    """Also where more are asked for than the search needs."""
    wanted = offline([5, 6], beam_width=3, max_tokens=6, ignore_eos=True)

    async def scene(front: Any) -> None:
        body = {"prompt": [5, 6], **BEAMS, "ignore_eos": True, "logprobs": asked}
        _, reply = await front.post("/v1/completions", body)
        for sequence, choice in zip(wanted, reply["choices"], strict=True):
            shown = choice["logprobs"]
            assert sum(shown["token_logprobs"]) == pytest.approx(sequence.cum_logprob)
            assert len(shown["tokens"]) == len(choice["token_ids"]) == 6
            for top in shown["top_logprobs"]:
                assert asked <= len(top) <= asked + 1

    run_with(scene)


def test_a_conversation_is_searched_too() -> None:
    async def scene(front: Any) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        body = {"messages": messages, **BEAMS, "logprobs": True, "top_logprobs": 2}
        status, reply = await front.post("/v1/chat/completions", body)
        assert status == 200, reply
        choices = reply["choices"]
        want = offline(choices[0]["prompt_token_ids"], beam_width=3, max_tokens=6, ignore_eos=True)
        assert len({tuple(choice["token_ids"]) for choice in choices}) == 3
        for index, (sequence, choice) in enumerate(zip(want, choices, strict=True)):
            content = choice["logprobs"]["content"]
            assert choice["index"] == index and choice["message"]["content"]
            assert sum(one["logprob"] for one in content) == pytest.approx(sequence.cum_logprob)
            assert all(len(one["top_logprobs"]) == 2 for one in content)

    run_with(scene)


def test_without_a_limit_the_context_ends_it() -> None:
    async def scene(front: Any) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        body = {"messages": messages, "use_beam_search": True, "ignore_eos": True}
        front.engine.info = dataclasses.replace(front.engine.info, max_model_len=64)
        _, reply = await front.post("/v1/chat/completions", body)
        assert reply["usage"]["total_tokens"] == 64
        assert reply["choices"][0]["finish_reason"] == "length"

    run_with(scene)


# --- what is refused ------------------------------------------------------------------------------

REFUSED: list[tuple[str, Any]] = [
    *[("stream", True), ("n", 11), ("best_of", 11), ("length_penalty", 10.5)],
    *[("length_penalty", "1"), ("length_penalty", -1e30), ("early_stopping", True)],
    *[("use_beam_search", 1), ("temperature", 3), ("max_tokens", 5000), ("max_tokens", 0)],
    *[("top_p", 0.5), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.1)],
    *[("presence_penalty", 1), ("frequency_penalty", 1), ("stop", "x"), ("stop_token_ids", [5])],
    *[("min_tokens", 1), ("logit_bias", {"5": 1}), ("allowed_token_ids", [5])],
    *[("bad_words", ["x"]), ("prompt_logprobs", 1), ("top_p", 7)],
]


def test_what_has_no_meaning_in_a_search_is_refused_by_name() -> None:
    async def scene(front: Any) -> None:
        for name, value in REFUSED:
            body = {"prompt": "Hi", "use_beam_search": True, "temperature": 0, name: value}
            for path in ("/v1/completions", "/generate"):
                status, reply = await front.post(path, body)
                assert (status, reply["error"]["param"]) == (400, name), (name, reply)
                assert name in reply["error"]["message"]
        body = {"prompt": "Hi", "use_beam_search": True, "echo": True, "logprobs": 1}
        assert (await front.post("/v1/completions", body))[1]["error"]["param"] == "echo"
        status, reply = await front.post("/v1/completions", {"prompt": "Hi", "length_penalty": 2})
        assert (status, reply["error"]["param"]) == (400, "length_penalty")
        assert not front.engine.submitted

    run_with(scene)


def test_values_that_change_nothing_are_welcome() -> None:
    sampling = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0}
    others = {"stop": [], "logit_bias": {}, "early_stopping": False, "length_penalty": 1}
    neutral = {**sampling, **others, "temperature": 0.7, "seed": 7, "echo": True}

    async def scene(front: Any) -> None:
        _, plain = await front.post("/v1/completions", {"prompt": "Hi", **BEAMS})
        status, reply = await front.post("/v1/completions", {"prompt": "Hi", **BEAMS, **neutral})
        assert status == 200, reply
        texts = [choice["text"] for choice in reply["choices"]]
        assert texts == ["Hi" + choice["text"] for choice in plain["choices"]]

    run_with(scene)


# --- clients that leave, and an engine that fails -------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_client_that_leaves_frees_all_its_beams(frozen: bool) -> None:
    async def scene(front: Any) -> None:
        body = {**ENDLESS, "prompt": ["Hi", "Ho"]}
        task = asyncio.create_task(front.post("/v1/completions", body))
        await until(lambda: len(front.engine.live) == 6)
        front.engine.frozen = frozen
        await asyncio.sleep(0.03)
        task.cancel()
        async with timeout(1):  # between two rounds no beam is in the engine either
            while (await front.get("/load"))[1] != {"server_load": 0}:
                await asyncio.sleep(0.005)
        assert not front.engine.live
        submitted = len(front.engine.submitted)
        await asyncio.sleep(0.03)
        assert len(front.engine.submitted) == submitted

    run_with(scene, FakeEngineClient(list(story()), step_s=0.005))


def fail(engine: FakeEngineClient) -> None:
    engine.fail_after = 0


def wait_too_long(engine: FakeEngineClient) -> None:
    engine.queue_error = QueueTimeoutError("It waited too long.", 4)


def die(engine: FakeEngineClient) -> None:
    engine.state = "dead"


def drain(engine: FakeEngineClient) -> None:
    engine.state = "draining"


def fill(engine: FakeEngineClient) -> None:
    engine._capacity = 2


@pytest.mark.parametrize(
    ("happens", "status", "code"),
    [
        (fail, 500, "generation_failed"),
        (wait_too_long, 503, "queue_timeout"),
        (die, 503, "engine_dead"),
        (drain, 503, "shutting_down"),
        (fill, 429, "overloaded"),
    ],
)
def test_what_happens_during_a_search_ends_it(happens: Any, status: int, code: str) -> None:
    async def scene(front: Any) -> None:
        task = asyncio.create_task(front.post("/v1/completions", ENDLESS))
        await until(lambda: len(front.engine.live) == 3)
        happens(front.engine)
        async with timeout(2):
            got, reply = await task
        assert (got, reply["error"]["code"]) == (status, code)
        assert not front.engine.live

    run_with(scene, FakeEngineClient(list(story()), step_s=0.005))


def test_more_beams_than_the_queue_could_take_are_refused_for_good() -> None:
    async def main() -> None:
        async with front_end(max_queue=8) as front:
            body = {**ENDLESS, "prompt": ["a"] * 3}
            assert (await front.post("/v1/completions", body))[0] == 400

    asyncio.run(main())


# --- the demo model -------------------------------------------------------------------------------


SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
"""Few programs to compile."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server with the demo model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        port = free_port()
        flags = (f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items())
        with running("--port", str(port), "--enforce-eager", *flags) as server:
            server.wait_ready()
            yield port


def test_the_demo_model_gives_what_the_llm_gives(port: int) -> None:
    prompts = ["Once upon a time", "What is jaxserve?"]
    settings = {"max_tokens": 12, "length_penalty": 0.8}
    with LLM(enforce_eager=True, use_tqdm=False, **SMALL) as llm:
        outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=4, **settings))
        eos = llm._engine.eos_token_ids
    body = {"prompt": prompts, "use_beam_search": True, "n": 4, "logprobs": 1, "echo": False}
    status, reply = ask(port, "/v1/completions", {**body, **settings, "return_token_ids": True})
    assert status == 200, reply
    sequences = [sequence for output in outputs for sequence in output.sequences]
    for sequence, choice in zip(sequences, reply["choices"], strict=True):
        assert sequence.tokens == choice["prompt_token_ids"] + choice["token_ids"]
        assert sequence.text is not None and sequence.text.endswith(choice["text"])
        assert choice["finish_reason"] == sequence.finish_reason
        total = math.fsum(choice["logprobs"]["token_logprobs"])
        ended = sequence.logprobs[len(choice["token_ids"]) :]
        total += sum(max(one[token].logprob for token in eos if token in one) for one in ended)
        assert total == pytest.approx(sequence.cum_logprob, abs=1e-3)
    _, echoed = ask(port, "/v1/completions", {**body, **settings, "logprobs": None, "echo": True})
    assert [one["text"] for one in echoed["choices"]] == [one.text for one in sequences]
