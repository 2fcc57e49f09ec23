"""`jaxserve chat --url`: the conversation with a running server, which has a fake engine."""

from __future__ import annotations

import io
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.__main__ import main
from tests.helpers.patience import poll, within
from tests.jaxserve.cli.command import start
from tests.server.running import free_port, running

KEY = "sesame"
FAKE = {"pace": "slow", "engine": {"num_pages": 512, "vocab_size": 2048}}
"""A step takes 20 ms, and each token is a function of those before it."""
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that wants a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        port = free_port()
        with running("--port", str(port), "--api-key", KEY, fake=FAKE) as server:
            server.wait_ready()
            yield f"http://127.0.0.1:{port}"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def chat(patch: pytest.MonkeyPatch, capsys: Any, turns: str, *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a chat with piped turns."""
    patch.setattr("sys.stdin", io.StringIO(turns))
    try:
        code = main(["chat", *words])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def load(url: str) -> int:
    """Requests that the server works on."""
    request = urllib.request.Request(f"{url}/load", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=within(10)) as reply:
        return int(json.load(reply)["server_load"])


def roles(file: Path) -> list[str]:
    return [message["role"] for message in json.loads(file.read_text())]


def test_a_conversation_with_its_commands(
    url: str, key: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    turns = f"Hello!\nGo on.\n/save {first}\n/reset\nHello!\n/save {second}\n/stats\n"
    code, out, err = chat(
        monkeypatch, capsys, turns, "--url", f"{url}/v1", *GREEDY, "--system", "Be kind."
    )
    assert (code, err) == (0, "")
    assert roles(first) == ["system", "user", "assistant", "user", "assistant"]
    assert roles(second) == ["system", "user", "assistant"]
    assert json.loads(second.read_text()) == json.loads(first.read_text())[:3]
    assert json.loads(first.read_text())[2]["content"]
    assert "output 8 tokens" in out and "ended by length" in out
    assert "first token after" in out and " of 2044 tokens" in out and "in all" not in out


def test_settings_go_along_only_when_they_are_set(
    url: str, key: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = ("temperature 9", "nonsense 1", "max_tokens 3", "min_tokens 2")
    turns = "".join(f"/set {words}\n" for words in settings) + "Hi\n/stats\n/set\n"
    code, out, err = chat(monkeypatch, capsys, turns, "--url", url)
    assert code == 1
    assert "must be from 0 to 2, got 9" in err and "no setting 'nonsense'" in err
    assert err.count("\n") == 2
    assert "output 3 tokens" in out
    assert "max_tokens = 3" in out and "temperature = None" in out


def test_what_the_server_refuses_ends_only_the_turn(
    url: str, key: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    turns = f"{'long ' * 3000}\nHi\n/stats\n"
    code, out, err = chat(monkeypatch, capsys, turns, "--url", url, *GREEDY)
    assert code == 1 and "output 8 tokens" in out
    assert err.startswith("Error: 400 from http") and err.count("\n") == 1


def test_without_the_key_or_a_server_one_line_says_so(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, _, err = chat(monkeypatch, capsys, "Hi\n", "--url", url)
    assert code == 1 and "401 from http" in err and err.count("\n") == 1
    assert chat(monkeypatch, capsys, "", "--url", url, "--api-key", KEY)[0] == 0
    nowhere = f"http://127.0.0.1:{free_port()}"
    code, _, err = chat(monkeypatch, capsys, "Hi\n", "--url", nowhere)
    assert code == 1 and "no server answers" in err and err.count("\n") == 1
    code, _, err = chat(
        monkeypatch, capsys, "Hi\n", "--url", url, "--api-key", KEY, "--model-name", "other"
    )
    assert code == 1 and "'other' does not exist" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["some/model", "--url", "http://x"], "MODEL has no meaning with --url"),
        (["--url", "http://x", "--max-num-seqs", "4"], "--max-num-seqs has no meaning with --url"),
        (["--url", "http://x", "--chat-template", "f"], "--chat-template has no meaning with"),
        (["--model-name", "x"], "--model-name needs --url"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, out, err = chat(monkeypatch, capsys, "Hi\n", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_ctrl_c_stops_the_answer_and_the_server_but_not_the_chat(url: str) -> None:
    with start("chat", "--url", url, "--api-key", KEY, "--ignore-eos") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("Hello!\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        assert load(url) == 1
        process.send_signal(signal.SIGINT)
        poll(lambda: not load(url))
        out, err = process.communicate("/set max_tokens 5\nAnd now?\n/stats\n", timeout=within(60))
    assert (process.returncode, err) == (0, "")
    assert " [stopped]\n" in out and "output 5 tokens" in out
