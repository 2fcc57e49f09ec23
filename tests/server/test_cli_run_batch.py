"""`jaxserve run-batch` answers a file through the routes' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.__main__ import main


def line(custom_id: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


CHAT = [{"role": "user", "content": "Who are you?"}]
LINES = [
    line("chat", "/v1/chat/completions", messages=CHAT, temperature=0),
    line("two", "/v1/completions", prompt=["Once", "One"], max_tokens=4, ignore_eos=True),
    line("vector", "/v1/embeddings", input="Once upon a time"),
    "",
    line("refused", "/v1/completions", prompt="a", max_tokens=-5),
    line("stream", "/v1/completions", prompt="a", stream=True),
    line("elsewhere", "/v1/audio", prompt="a"),
    json.dumps({"custom_id": "got", "method": "GET", "url": "/v1/completions", "body": {}}),
    json.dumps({"url": "/v1/completions"}),
    "[1",
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The answers to LINES by the demo model."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_text("\n".join(LINES) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("XLA_FLAGS", "")
        words = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
        words += ["--max-num-seqs", "2", "--enforce-eager"]
        assert main(["run-batch", *words]) == 1  # some are refused
    return [json.loads(answer) for answer in (folder / "out.jsonl").read_text().splitlines()]


def by_id(answers: list[dict[str, Any]], custom_id: str) -> dict[str, Any]:
    (answer,) = [one for one in answers if one["custom_id"] == custom_id]
    return answer


def test_each_line_has_one_answer(answers: list[dict[str, Any]]) -> None:
    assert len(answers) == len(LINES) - 1
    assert all(one.keys() == {"id", "custom_id", "response", "error"} for one in answers)
    assert len({one["id"] for one in answers}) == len(answers)


def test_answers_are_those_of_the_routes(answers: list[dict[str, Any]]) -> None:
    chat, two, vector = (by_id(answers, name) for name in ("chat", "two", "vector"))
    for answer in (chat, two, vector):
        assert answer["response"]["status_code"] == 200 and answer["error"] is None
        assert answer["response"]["request_id"]
    assert "jaxserve" in chat["response"]["body"]["choices"][0]["message"]["content"]
    assert two["response"]["body"]["usage"]["completion_tokens"] == 8
    assert vector["response"]["body"]["data"][0]["embedding"]


def test_a_refused_request_has_the_refusal_as_its_body(answers: list[dict[str, Any]]) -> None:
    response = by_id(answers, "refused")["response"]
    assert response["status_code"] == 400
    assert response["body"]["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("custom_id", "message"),
    [
        ("stream", "must not ask for a stream"),
        ("elsewhere", "one of /v1/chat/completions"),
        ("got", "method and url must be POST"),
    ],
)
def test_a_line_that_is_no_request_says_why(
    answers: list[dict[str, Any]], custom_id: str, message: str
) -> None:
    answer = by_id(answers, custom_id)
    assert answer["response"] is None and message in answer["error"]["message"]


def test_lines_without_an_id_are_answered_too(answers: list[dict[str, Any]]) -> None:
    errors = [one["error"]["message"] for one in answers if one["custom_id"] is None]
    assert any("no JSON" in error for error in errors)
    assert any('"custom_id"' in error for error in errors) and len(errors) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: "),
        (["-i", "no/file", "-o", "out"], "no/file: No such file or directory"),
        (["-i", "a", "-o", "b", "--port", "1"], "unrecognized arguments: --port"),
        (["-i", "a", "-o", "b", "--enable-lora"], "--enable-lora is not supported"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["run-batch", *words])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_model_that_cannot_be_loaded_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text(LINES[0])
    words = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "no/such/model"]
    assert main(["run-batch", *words]) == 1
    assert "no/such/model" in capsys.readouterr().err
