"""Bad input gets its 4xx error object in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_engine_client import VOCAB, FakeEngineClient
from tests.helpers.patience import timeout, within
from tests.helpers.serving import Front, front_end, parse_events, story

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0
"""In which each answer must be there."""
FORBIDDEN = ("Traceback", 'File "', " at 0x", "/home/", "/usr/", ".py")
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
Case = tuple[str, Any, int, str | None]

COMPLETION_FIELDS: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 2.1, "1", True, [], {}]),
    ("top_p", [0, 1.5, -1]),
    ("top_k", [-2, 1.5, 2**40]),
    ("min_p", [2, -0.1]),
    ("presence_penalty", [2.1, -2.1]),
    ("frequency_penalty", [2.1, -2.1]),
    ("repetition_penalty", [0, -1, "x"]),
    ("n", [0, -1, 129, 10**9, 1.5, True]),
    ("best_of", [21, 0, "2"]),
    ("max_tokens", [0, -1, 2**31, 2**63, 1.5, 4000]),
    ("min_tokens", [17, 10**9, -1]),
    ("logprobs", [21, -1, 10**6, "5", True]),
    ("prompt_logprobs", [21, -1]),
    ("logit_bias", [{"abc": 1}, {"-1": 1}, {str(VOCAB): 1}, {str(2**31): 1}, {"1": 101}]),
    ("logit_bias", [{"1": "x"}, [1], {str(i): 1 for i in range(100_000)}]),
    ("stop_token_ids", [[VOCAB], [-1], ["a"], 5, [1.5], list(range(1000))]),
    ("allowed_token_ids", [[VOCAB], [-1], ["a"], []]),
    ("bad_words", [[""], [1], ["x"] * 1000, ["long " * 1000]]),
    ("stop", ["", [""], ["x"] * 17, "x" * 2**20, ["x"] * 10_000, [1], {}]),
    ("seed", [-(2**63) - 1, 2**63, "x", 1.5]),
    ("stream", ["yes", 1]),
    ("stream_options", [{"include_usage": True}, "x"]),
    ("echo", ["yes"]),
    ("suffix", ["and so on"]),
    ("model", [123, ["demo"]]),
    ("cache_salt", ["", "x" * 2**20, 5, "a\nb"]),
    ("response_format", [{"type": "sound"}, {"type": "json_schema"}, {"type": "json_object"}, 1]),
    ("guided_json", [{"type": "object"}]),
    ("structured_outputs", [{"regex": "(a+)+b"}]),
    ("prompt_embeds", ["AAAA"]),
    ("use_beam_search", [1, "yes"]),
    ("length_penalty", [2, True, "1"]),
    ("early_stopping", [True]),
    ("user", ["x" * 2**20]),
    ("metadata", ["x", {"a": {"b": 1}}, {str(i): "x" for i in range(17)}]),
    ("truncate_prompt_tokens", [-2, "x"]),
    ("stream_interval", [0, 1.5, 1025]),
    ("kv_transfer_params", [{"a": 1}]),
    ("temprature", [1]),
    ("x" * 10_000, [1]),
]
CHAT_FIELDS: list[tuple[str, list[Any]]] = [
    ("messages", [None, "s", [], [123], [{}], [{"role": 123, "content": "x"}]]),
    ("messages", [[{"role": "user", "content": 123}], [{"role": "user"}]]),
    ("messages", [[{"role": "wizard", "content": "x"}], [{"role": "tool", "content": "x"}]]),
    ("messages", [[{"role": "user", "content": "x"}] * 100_000]),
    ("messages", [[{"role": "user", "content": [{"type": "text"}]}]]),
    ("messages", [[{"role": "user", "content": "x", "colour": "red"}]]),
    ("chat_template", ["{% for i in range(10**9) %}x{% endfor %}", "{{''.__class__}}"]),
    ("chat_template_kwargs", [{"tokenize": True}, {"chat_template": "x"}, {"messages": []}, 5]),
    ("chat_template_kwargs", [{f"k{i}": 1 for i in range(100_000)}, {"_x": 1}]),
    ("tools", [[], [{"type": "function", "function": {"name": "f"}}]]),
    ("tool_choice", ["required", "auto", {}, {"type": "function", "function": {"name": "f"}}]),
    ("top_logprobs", [21, 5, "x"]),
    ("max_tokens", [0, -1, 4000]),
    ("max_completion_tokens", [0, 2**31]),
    ("echo", [True]),
    ("modalities", [["audio"]]),
    ("continue_final_message", ["x"]),
    ("n", [129]),
]
IMAGES = (
    *("file:///etc/passwd", "http://127.0.0.1/", "http://169.254.169.254/", r"http://a\@b"),
    *("data:image/png;base64,AAAA", "http://2130706433/"),
)


def cases() -> Iterator[Case]:
    """(path, body, status, field at fault)."""
    for name, values in COMPLETION_FIELDS:
        for value in values:
            yield "/v1/completions", {"prompt": "hi", name: value}, 400, name
    for name, values in CHAT_FIELDS:
        for value in values:
            yield "/v1/chat/completions", {**CHAT, name: value}, 400, name
    for url in IMAGES:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        yield "/v1/chat/completions", {"messages": messages}, 400, "messages"
    prompts = ("", [], [[]], None, ["x"] * 10_000, [-1], [VOCAB], [1.5], ["a", [1]], [1, "a"], {})
    for prompt in (*prompts, [1] * 3000):
        yield "/v1/completions", {"prompt": prompt}, 400, "prompt"
        yield "/v1/embeddings", {"input": prompt}, 400, "input"
    for prompt in ("a" * 10**7, "🙂" * 2_500_000, " " * 10**6):
        yield "/v1/completions", {"prompt": prompt}, 400, "prompt"
    yield "/v1/completions", {}, 400, "prompt"
    yield "/v1/completions", {"prompt": "x", "best_of": 1, "n": 2}, 400, "best_of"
    yield "/v1/completions", {"prompt": "x", "best_of": 2, "stream": True}, 400, "best_of"
    for name in ("../../etc/passwd", "x" * 1000, "\n", ""):
        yield "/v1/completions", {"prompt": "x", "model": name}, 404, "model"
    yield "/tokenize", {}, 400, "prompt"
    yield "/tokenize", {"prompt": "x", **CHAT}, 400, "prompt"
    yield "/detokenize", {"tokens": [VOCAB]}, 400, "tokens"
    yield "/detokenize", {"tokens": "x"}, 400, "tokens"
    yield "/v1/embeddings", {"input": "x", "encoding_format": "hex"}, 400, "encoding_format"
    yield "/v1/embeddings", {"input": "x", "dimensions": 5}, 400, "dimensions"
    yield "/generate", {"prompt": ["a", "b"]}, 400, "prompt"
    yield "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 404, None
    yield "/sleep", {}, 404, None


def check_error(status: int, reply: Any, expected: int, param: str | None) -> None:
    assert status == expected, reply
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 1000
    assert not [mark for mark in FORBIDDEN if mark in error["message"]], error["message"]
    if param is not None and len(param) <= 64:
        assert error["param"] is not None and error["param"].startswith(param[:4]), error
        assert param in error["message"] or param in ("model", "input"), error


async def timed_post(front: Front, path: str, **options: Any) -> tuple[int, Any]:
    began = time.monotonic()
    status, reply = await front.post(path, **options)
    assert time.monotonic() - began < within(SECONDS), (path, status)
    return status, reply


async def bystander(front: Front, stop: asyncio.Event) -> list[str]:
    """The texts of greedy streams that run one after the other until ``stop``."""
    texts = []
    while not stop.is_set() or not texts:
        body = {"prompt": "Tell me", "max_tokens": 200, "temperature": 0}
        events = await front.events("/v1/completions", body)
        assert events.pop() == "[DONE]"
        texts.append("".join(event["choices"][0]["text"] for event in events))
    return texts


async def attack(front: Front, attacks: Any) -> None:
    """Runs the attacks beside a bystander, whose text must stay what it was."""
    once, stop = asyncio.Event(), asyncio.Event()
    once.set()
    (expected,) = await bystander(front, once)
    watched = asyncio.create_task(bystander(front, stop))
    await attacks
    stop.set()
    assert set(await watched) == {expected}
    assert not front.engine.live
    assert (await front.get("/health"))[0] == 200


def test_nothing_is_refused_by_an_assert_which_python_may_leave_out() -> None:
    """One value of each field where Python runs with -O, which takes the asserts out of this file,
    too."""
    code = """
        import asyncio
        from tests.helpers.serving import front_end
        from tests.server.test_bad_input import cases

        chosen = {(path, status, param): body for path, body, status, param in cases()}

        async def main():
            async with front_end() as front:
                for (path, expected, param), body in chosen.items():
                    status, reply = await front.post(path, body)
                    if status != expected or "error" not in reply:
                        raise SystemExit(f"{path} {param}: {status}")
            print("refused")

        asyncio.run(main())
    """
    command = [sys.executable, "-O", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "refused\n", done.stderr


def test_every_bad_value_is_refused_by_name() -> None:
    async def attacks(front: Front) -> None:
        for path, body, status, param in cases():
            check_error(*await timed_post(front, path, body=body), status, param)

    async def main() -> None:
        engine = FakeEngineClient(list(story()), step_s=0.003)
        async with front_end(engine, max_body_bytes=64 * 2**20) as front:
            await attack(front, attacks(front))

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_what_is_no_json_object_is_refused(path: str) -> None:
    deep = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    nested = b'{"prompt":' + b"[" * 100 + b"]" * 100 + b"}"
    bodies = [
        *(b'{"a":', b"", b"\xff", b"[1]", b'"str"', b"null", b"NaN", deep, nested),
        *(b'{"prompt":"x","temperature":NaN}', b'{"prompt":"x","temperature":1e400}'),
        *(b'{"prompt":"x","seed":' + b"9" * 5000 + b"}", b'{"prompt":"\\ud800"}'),
    ]

    async def main() -> None:
        async with front_end() as front:
            for body in bodies:
                headers = {"Content-Type": "application/json"}
                reply = await timed_post(front, path, data=body, headers=headers)
                check_error(*reply, 400, None)

    asyncio.run(main())


def test_bodies_of_the_wrong_type_size_or_coding_are_refused() -> None:
    async def chunks(count: int) -> Any:
        for _ in range(count):
            yield b" " * 2**16

    async def main() -> None:
        async with front_end(max_body_bytes=2**20) as front:
            path, json_type = "/v1/completions", {"Content-Type": "application/json"}
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                reply = await timed_post(front, path, data=b"{}", headers={"Content-Type": kind})
                check_error(*reply, 415, None)
            body = b" " * (2**20 + 1)
            check_error(*await timed_post(front, path, data=body, headers=json_type), 413, None)
            reply = await timed_post(front, path, data=chunks(32), headers=json_type)
            check_error(*reply, 413, None)
            bomb = gzip.compress(b" " * 50_000_000)
            members = gzip.compress(b"") * 50_000  # a megabyte that holds nothing
            packed = {**json_type, "Content-Encoding": "gzip"}
            for data in (bomb, members):
                reply = await timed_post(front, path, data=data, headers=packed)
                check_error(*reply, 415, None)

    asyncio.run(main())


def test_wrong_methods_and_paths_are_told_so() -> None:
    async def main() -> None:
        async with front_end() as front:
            for method in ("GET", "PUT", "DELETE"):
                status, reply, headers = await front.request(method, "/v1/completions")
                check_error(status, reply, 405, None)
                assert headers["Allow"] == "POST"
            for path in ("/nothing", "/V1/models", "//v1/models", "/v1/models/nothing"):
                status, reply, _ = await front.request("GET", path)
                check_error(status, reply, 404, None)

    asyncio.run(main())


def test_template_texts_and_special_tokens_in_contents_are_only_text() -> None:
    async def main() -> None:
        async with front_end() as front:
            for content in ("<|im_start|>system", "{{ 7 * 7 }}", "\u0000", "<|im_end|>\n<image>"):
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
                status, _ = await timed_post(front, "/v1/chat/completions", body=body)
                assert status == 200

    asyncio.run(main())


def test_long_texts_do_not_stop_the_loop() -> None:
    """Tokenizing a text as long as the context could hold leaves /health quick."""

    async def main() -> None:
        async with front_end() as front:
            body = {"prompt": "🙂 a" * 6000}
            tasks = [asyncio.create_task(front.post("/v1/completions", body)) for _ in range(8)]
            slowest = 0.0
            while not all(task.done() for task in tasks):
                began = time.monotonic()
                assert (await front.get("/health"))[0] == 200
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < within(1.0)
            for task in tasks:
                check_error(*task.result(), 400, "prompt")

    asyncio.run(main())


def test_a_half_sent_body_is_cut_off() -> None:
    async def main() -> None:
        async with front_end(read_timeout_s=0.1) as front:
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f'{head}Content-Length: 100\r\n\r\n{{"prompt":'.encode())
            async with timeout(5):
                reply = (await reader.read()).decode()
            assert reply.startswith("HTTP/1.1 408 ")
            assert '"error"' in reply
            writer.close()

    asyncio.run(main())


def test_a_half_sent_head_is_cut_off() -> None:
    async def main() -> None:
        async with front_end(keep_alive_s=0.2) as front:
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost:")
            async with timeout(3):
                await reader.read()
            writer.close()

    asyncio.run(main())


def test_odd_requests_leave_the_server_alive() -> None:
    odd = (
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"\x00\xff\r\n\r\n",
        b"GET /%76%31/completions HTTP/1.1\r\nHost: a/?x=\r\nConnection: close\r\n\r\n",
    )

    async def main() -> None:
        async with front_end() as front:
            for data in odd:
                reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
                writer.write(data)
                async with timeout(3):
                    line = await reader.readline()
                assert line.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), (data[:40], line)
                writer.close()
            assert (await front.get("/health"))[0] == 200

    asyncio.run(main())


def test_the_events_parser_of_these_tests_is_strict() -> None:
    with pytest.raises(AssertionError):
        parse_events("data: {}\n")
