"""The chat: its commands with a stand-in for the model, and the real one over a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.cli.chat import Chat
from jaxserve.cli.chat_models import LocalModel, ServedModel
from jaxserve.cli.turns import read_turns
from jaxserve.engine.stats import Stats
from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling.params import SamplingParams
from tests.jaxserve.cli.command import run


class EchoLLM:
    """Answers "<number of messages>:<last content>" word by word; refuses the word "refuse"."""

    stats = Stats()
    config = SimpleNamespace(max_model_len=99)

    def __init__(self) -> None:
        self.seen: list[tuple[list[dict[str, Any]], SamplingParams]] = []

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(top_p=0.9)

    def chat(self, messages: Any, params: SamplingParams, use_tqdm: bool, on_text: Any) -> None:
        if messages[-1]["content"] == "refuse":
            raise InvalidRequestError("The prompt is too long.")
        self.seen.append((messages, params))
        output = RequestOutput("0", None, [1, 2], [CompletionOutput(0, finish_reason="stop")])
        for word in (f"{len(messages)}:", messages[-1]["content"]):
            on_text(output, word)


@pytest.fixture
def llm() -> EchoLLM:
    return EchoLLM()


@pytest.fixture
def chat(llm: EchoLLM) -> Chat:
    return Chat(LocalModel(llm, None), {"temperature": 0.5}, None)  # type: ignore[arg-type]


def test_turns_build_up_and_reset_forgets_them(chat: Chat, llm: EchoLLM, capsys) -> None:
    for turn in ("one", "two", "/reset", "three"):
        assert chat.handle(turn)
    assert capsys.readouterr().out == "1:one\n3:two\n1:three\n"
    assert [message["content"] for message in chat.messages] == ["three", "1:three"]
    assert llm.seen[0][1] == SamplingParams(top_p=0.9, temperature=0.5, max_tokens=None)
    assert not chat.handle("/exit")


def test_system_and_retry(chat: Chat, llm: EchoLLM) -> None:
    for turn in ("/system Be short.", "one", "/retry"):
        chat.handle(turn)
    wanted = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "one"}]
    assert [messages for messages, _ in llm.seen] == [wanted, wanted]
    assert len(chat.messages) == 2
    chat.handle("/system")
    chat.handle("two")
    assert llm.seen[-1][0][0]["role"] == "user"


def test_settings_are_checked_before_they_change(chat: Chat, llm: EchoLLM, capsys) -> None:
    for turn in ("/set temperature 0", "/set temperature 9", "/set nonsense 1", "/set stop END"):
        chat.handle(turn)
    chat.handle("/set max_tokens none")
    chat.handle("one")
    assert chat.failed
    params = llm.seen[0][1]
    assert params.greedy and params.stop == ("END",) and params.max_tokens is None
    chat.handle("/set temperature 1")
    chat.handle("two")
    assert llm.seen[1][1].top_p == 0.9  # greedy had set it aside
    err = capsys.readouterr().err
    assert "must be from 0 to 2, got 9" in err and "There is no setting 'nonsense'" in err


def test_save_and_load(chat: Chat, tmp_path, capsys) -> None:
    file = tmp_path / "a chat.json"
    for turn in ("/system S", "one", f"/save {file}", "/reset", "/system T", f"/load {file}"):
        chat.handle(turn)
    assert [message["role"] for message in json.loads(file.read_text())] == [
        *("system", "user", "assistant")
    ]
    chat.handle("two")
    assert "4:two" in capsys.readouterr().out
    file.write_text('[{"role": "user"}]')
    for turn in (f"/load {file}", "/load", "/load no-such-file", "/save"):
        chat.failed = False
        assert chat.handle(turn) and chat.failed
    assert len(chat.messages) == 4


def test_what_goes_wrong_ends_only_the_turn(chat: Chat, capsys) -> None:
    for turn in ("/retry", "/nonsense", "one", "refuse", "/help", "/stats", "", "two"):
        assert chat.handle(turn)
    captured = capsys.readouterr()
    assert "nothing to answer" in captured.err and "no command /nonsense" in captured.err
    assert "too long" in captured.err
    assert "3:two" in captured.out and "/save FILE" in captured.out
    assert "last answer: prompt 2 tokens, output 2 tokens" in captured.out


class StubbornClient:
    """A server that says one word and then nothing, until the user presses Ctrl-C."""

    url = "http://server"

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.closed = 0

    def model(self, name: str | None) -> dict[str, Any]:
        return {"id": name or "first"}

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.bodies.append(body)
        try:
            if body["messages"][-1]["content"] == "speak":
                yield {"choices": [{"index": 0, "delta": {"content": "Word"}}]}
            raise KeyboardInterrupt
        finally:
            self.closed += 1


def test_ctrl_c_stops_a_server_that_is_silent(capsys) -> None:
    client = StubbornClient()
    chat = Chat(ServedModel(client, None), {"top_p": 0.5}, None)  # type: ignore[arg-type]
    assert all(map(chat.handle, ("silence", "speak", "/stats")))
    assert capsys.readouterr().out.startswith(" [stopped]\nWord [stopped]\nlast answer: stopped\n")
    assert client.closed == 2 and not chat.failed
    assert [message["content"] for message in chat.messages] == ["speak", "Word"]
    messages = [{"role": "user", "content": "silence"}]
    told = {"model": "first", "messages": messages, "top_p": 0.5}
    assert client.bodies[0] == told | {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\\\nb\nc", ["a\nb", "c"]),
        ('"""a\n\n b\n"""\nc\n', ["a\n\n b", "c"]),
        ('"""\na\nb"""\n', ["a\nb"]),
        ('"""open\nend', ["open\nend"]),
        ('"""one line"""', ["one line"]),
        ('"""', [""]),
        ("last\\", ["last\n"]),
    ],
)
def test_turns_span_lines_where_the_user_says_so(text: str, turns: list[str]) -> None:
    assert list(read_turns(io.StringIO(text), interactive=False)) == turns


def test_the_demo_model_answers_over_a_pipe() -> None:
    words = ("chat", "--temperature", "0", "--max-tokens", "12", "--max-num-seqs", "4")
    code, out, err = run(*words, stdin="Hello!\nWho are you?\n/reset\nHello!\n")
    assert code == 0, err
    first, second, third = out.splitlines()
    assert first == third and first and second
    assert ">" not in out
