"""The real OpenAI client, in strict validation, understands every reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from server.engine_client import OverloadedError
from tests.helpers.fake_engine_client import FakeEngineClient
from tests.helpers.serving import Front, demo_tokenizer, front_end, story

HI: Any = [{"role": "user", "content": "hi"}]
Test = Callable[[AsyncOpenAI, Front], Coroutine[Any, Any, None]]


def check(
    test: Test, engine: FakeEngineClient | None = None, strict: bool = True, **settings: Any
) -> None:
    """Runs a test with a client and the front-end that it talks to.

    Streams of /v1/completions can't be read strictly: the client's schema knows no null for
    finish_reason there, which OpenAI's own server sends until the end.
    """

    async def main() -> None:
        async with front_end(engine, **settings) as front:
            client = AsyncOpenAI(
                base_url=f"{front.url}/v1",
                api_key="key",
                max_retries=0,
                _strict_response_validation=strict,
            )
            async with client:
                await test(client, front)
            assert not front.engine.live

    asyncio.run(main())


def expected_text(front: Front, prompt_ids: list[int], count: int) -> str:
    """What the fake engine says to a prompt, greedily."""
    ids = front.engine.tokens(prompt_ids, front.engine.submitted[-1][2], count)
    return demo_tokenizer().decode(ids)


def test_models() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        models = await client.models.list()
        assert [model.id for model in models.data] == ["one", "org/two"]
        assert (await client.models.retrieve("org/two")).owned_by == "jaxserve"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("three")

    check(test, served_model_name=("one", "org/two"))


def test_a_completion() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        reply = await client.completions.create(
            model="demo", prompt="Hello", max_tokens=12, temperature=0, logprobs=3
        )
        (choice,) = reply.choices
        assert choice.text == expected_text(front, demo_tokenizer().encode("Hello"), 12)
        assert choice.finish_reason == "length"
        assert reply.usage is not None
        assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (12, 13)
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.token_logprobs == [-1.5] * 12
        assert all(len(top) == 3 for top in choice.logprobs.top_logprobs or [])
        assert choice.logprobs.text_offset[:1] == [0]

    check(test)


def test_prompts_in_all_four_forms() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        ids = demo_tokenizer().encode("Hello")
        texts = []
        for prompt in ("Hello", ["Hello", "Hello"], ids, [ids, ids]):
            reply = await client.completions.create(model="demo", prompt=prompt, temperature=0)
            assert [choice.index for choice in reply.choices] == [*range(len(reply.choices))]
            texts += [choice.text for choice in reply.choices]
        assert len(texts) == 6 and len(set(texts)) == 1

    check(test)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_streamed_completion_is_the_same_text(logprobs: int | None) -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        settings: Any = {"model": "demo", "prompt": ["Hello", "Bye"], "max_tokens": 40}
        settings |= {"n": 2, "seed": 5, **({"logprobs": logprobs} if logprobs else {})}
        whole = await client.completions.create(**settings)
        texts, tokens, usage = [""] * 4, [0] * 4, None
        stream = await client.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                tokens[choice.index] += len(choice.logprobs.tokens or []) if choice.logprobs else 0
        assert texts == [choice.text for choice in whole.choices]
        assert len(set(texts)) > 2
        assert usage == whole.usage
        assert tokens == [40 if logprobs else 0] * 4

    check(test, strict=False)


def test_echo() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        reply = await client.completions.create(
            model="demo", prompt="Hello", max_tokens=3, temperature=0, echo=True
        )
        assert reply.choices[0].text.startswith("Hello")
        only = await client.completions.create(
            model="demo", prompt="Hello", max_tokens=0, echo=True
        )
        assert only.choices[0].text == "Hello"
        assert only.usage is not None and only.usage.completion_tokens == 0
        _, scored = await front.post(
            "/v1/completions", {"prompt": "Hello you", "max_tokens": 0, "echo": True, "logprobs": 1}
        )
        logprobs = scored["choices"][0]["logprobs"]
        assert "".join(logprobs["tokens"]) == "Hello you"
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == [-1.5] * (len(logprobs["tokens"]) - 1)

    check(test)


def test_the_best_of_several() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        reply = await client.completions.create(model="demo", prompt="Hi", n=2, best_of=5, seed=1)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.choices[0].logprobs is None
        assert reply.usage is not None and reply.usage.completion_tokens == 5 * 16
        assert [params.seed for _, _, params, _, _ in front.engine.submitted] == [1, 2, 3, 4, 5]

    check(test)


def test_an_answer() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        reply = await client.chat.completions.create(
            model="demo", messages=HI, max_completion_tokens=9, temperature=0,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
        (choice,) = reply.choices
        prompt = demo_tokenizer().apply_chat_template(HI, add_generation_prompt=True)
        ids = demo_tokenizer().encode(prompt, add_special_tokens=False)
        assert choice.message.content == expected_text(front, ids, 9)
        assert choice.message.role == "assistant"
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 9
        first = choice.logprobs.content[0]
        assert bytes(first.bytes or []).decode() == first.token
        assert [one.logprob for one in first.top_logprobs] == [-0.5, -1.5]

    check(test)


def test_a_streamed_answer_is_the_same_text() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        settings: Any = {"model": "demo", "messages": HI, "max_tokens": 30, "n": 3, "seed": 3}
        whole = await client.chat.completions.create(**settings)
        texts, roles, ends = ["", "", ""], ["", "", ""], [None, None, None]
        async for chunk in await client.chat.completions.create(**settings, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles[choice.index] += choice.delta.role or ""
                ends[choice.index] = choice.finish_reason
        assert texts == [choice.message.content for choice in whole.choices]
        assert roles == ["assistant"] * 3
        assert ends == ["length"] * 3

    check(test)


def test_an_answer_goes_up_to_the_end_of_the_context() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        reply = await client.chat.completions.create(model="demo", messages=HI, temperature=0)
        assert reply.usage is not None and reply.usage.total_tokens == 2048

    check(test)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_the_engines_work(stream: bool) -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        body = {"prompt": "Hi", "temperature": 0, "max_tokens": 500, "stop": ["and wrote", "zzz"]}
        if stream:
            events = await front.events("/v1/completions", body)
            choices = [event["choices"][0] for event in events[:-1]]
        else:
            choices = (await front.post("/v1/completions", body))[1]["choices"]
        text = "".join(choice["text"] for choice in choices)
        assert text.endswith("page by page, ")
        assert choices[-1]["finish_reason"] == "stop"
        assert choices[-1]["stop_reason"] == "and wrote"
        kept = {**body, "include_stop_str_in_output": True}
        _, reply = await front.post("/v1/completions", kept)
        assert reply["choices"][0]["text"] == text + "and wrote"

    check(test)


def test_sampling_fields_reach_the_engine() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "max_tokens": 5,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "stop": ("a", "b"),
        "stop_token_ids": (9,),
        "allowed_token_ids": (5, 6),
        "logit_bias": {5: 1.0},
    }

    async def test(client: AsyncOpenAI, front: Front) -> None:
        body = {
            "prompt": "Hi",
            **fields,
            "logit_bias": {"5": 1.0},
            "cache_salt": "salt",
            "priority": 3,
        }
        status, reply = await front.post("/v1/completions", body)
        assert status == 200, reply
        _, _, params, salt, priority = front.engine.submitted[-1]
        assert {name: getattr(params, name) for name in fields} == fields
        assert (salt, priority) == ("salt", 3)

    check(test)


def test_bad_words_are_tokenized_for_the_engine() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        await front.post("/v1/completions", {"prompt": "Hi", "bad_words": ["engine"]})
        params = front.engine.submitted[-1][2]
        assert params.bad_words_token_ids == demo_tokenizer().bad_words(["engine"])

    check(test)


def test_the_models_own_defaults_hold_where_the_request_says_nothing() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        assert front.engine.info is not None
        front.engine.info.default_sampling_params.update(temperature=0.25, top_k=3)
        await client.completions.create(model="demo", prompt="Hi", extra_body={"top_k": 9})
        params = front.engine.submitted[-1][2]
        assert (params.temperature, params.top_k) == (0.25, 9)

    check(test)


def test_token_ids_on_request() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"prompt": "Hi", "max_tokens": 3, "logprobs": 0, **ids}
        _, reply = await front.post("/v1/completions", body)
        (choice,) = reply["choices"]
        assert choice["prompt_token_ids"] == demo_tokenizer().encode("Hi")
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
        events = await front.events("/v1/completions", body)
        streamed = [event["choices"][0]["token_ids"] for event in events[:-1]]
        assert [one for ids in streamed for one in ids] == choice["token_ids"]

    check(test)


def test_truncated_prompts() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        await front.post("/v1/completions", {"prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2})
        assert front.engine.submitted[-1][1] == [7, 8]

    check(test)


def test_embeddings() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        settings: Any = {"input": ["Hello", "Hi"], "extra_body": {"pooling": "mean"}}
        reply = await client.embeddings.create(model="demo", encoding_format="float", **settings)
        assert [one.index for one in reply.data] == [0, 1]
        assert reply.data[0].embedding == [0.6, -0.8]
        assert reply.usage.prompt_tokens == 2

    check(test)


def test_an_embedding_that_fails_has_its_own_status() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        front.engine.queue_error = OverloadedError("The queue is full.", 2)
        assert (await front.post("/v1/embeddings", {"input": ["a", "b"]}))[0] == 429

    check(test)


def test_embeddings_in_base64_which_the_client_asks_for_by_itself() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        reply = await client.embeddings.create(model="demo", input="Hello")
        assert reply.data[0].embedding == [1.0, 0.5]

    check(test, strict=False)


def test_tokens_there_and_back() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        _, there = await front.post("/tokenize", {"prompt": "Hello 🙂", "return_token_strs": True})
        assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
        assert there["max_model_len"] == 2048
        assert await front.post("/detokenize", {"tokens": there["tokens"]}) == (
            200,
            {"prompt": "Hello 🙂"},
        )
        _, chat = await front.post("/tokenize", {"messages": HI})
        prompt = demo_tokenizer().apply_chat_template(HI, add_generation_prompt=True)
        assert chat["tokens"] == demo_tokenizer().encode(prompt, add_special_tokens=False)

    check(test)


def test_errors_are_the_clients_own_classes() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="nothing", prompt="Hi")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="demo", messages=HI, temperature=3)
        assert bad.value.param == "temperature"
        front.engine.fail_after = 3
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="demo", prompt="Hi")
        with pytest.raises(openai.APIError, match="The device failed"):
            stream = await client.chat.completions.create(model="demo", messages=HI, stream=True)
            async for _ in stream:
                pass

    check(test)


def test_a_model_without_a_tokenizer_takes_token_ids() -> None:
    async def test(client: AsyncOpenAI, front: Front) -> None:
        body = {"prompt": [5, 6], "max_tokens": 2, "return_token_ids": True}
        status, reply = await front.post("/v1/completions", body)
        assert status == 200 and len(reply["choices"][0]["token_ids"]) == 2
        for path, bad in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": HI}),
        ):
            assert (await front.post(path, bad))[0] == 400

    check(test, tokenizer=False, engine=FakeEngineClient(list(story())))
