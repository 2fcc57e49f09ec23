"""The server as a process: it starts, answers, drains and ends. Most tests use a fake engine."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.__main__ import main
from tests.helpers.patience import poll, within
from tests.server.running import NEVER, Running, ask, free_port, running, temporary_socket

FAKE = {"pace": "slow", "engine": {"num_pages": 512}}
"""A step takes 20 ms."""
NO_TEXT = "--skip-tokenizer-init"


def completion(max_tokens: int) -> dict[str, Any]:
    """A request that takes 20 ms per token."""
    return {"prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}


def in_background(port: int, max_tokens: int) -> tuple[threading.Thread, list[Any]]:
    """A request that runs while the test goes on; its (status, JSON) come into the list."""
    replies: list[Any] = []

    def work() -> None:
        try:
            replies.append(ask(port, "/v1/completions", completion(max_tokens)))
        except (OSError, http.client.HTTPException) as error:
            replies.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, replies


def num_running(port: int) -> float:
    """The requests that run in the engine, whoever asked for them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=within(10)) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    (family,) = (one for one in families if one.name == "jaxserve:num_requests_running")
    return family.samples[0].value


def wait_until_running(server: Running, port: int, count: int = 1) -> None:
    server.wait_for(lambda: ask(port, "/load")[1]["server_load"] == count)


# --- The demo model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, int, str]]:
    """(server, port, its curl) with the demo model and no other flag than the port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        port = free_port()
        with running("--port", str(port), "--max-num-seqs", "4") as server:
            yield server, port, server.wait_ready()


def test_the_last_lines_of_the_start_say_where_it_is_and_can_be_copied(demo: Any) -> None:
    server, port, curl = demo
    assert server.out[-2:] == [
        f"jaxserve: jaxserve-demo is ready at http://127.0.0.1:{port} (chat page, /docs, /v1)\n",
        curl,
    ]
    done = subprocess.run(
        [*shlex.split(curl), "-sf"], capture_output=True, check=True, timeout=within(60)
    )
    message = json.loads(done.stdout)["choices"][0]["message"]
    assert message["role"] == "assistant" and "jaxserve" in message["content"]


def test_settings_that_differ_from_the_defaults_are_told_once(demo: Any) -> None:
    server, port, _ = demo
    told = f"jaxserve: settings: {{'max-num-seqs': 4, 'port': {port}}}\n"
    assert server.err.count(told) == 1


@pytest.mark.parametrize("library", ["jaxlib", "libtorch"])
def test_the_front_end_loads_nothing_that_computes(demo: Any, library: str) -> None:
    server, _, _ = demo
    maps = Path(f"/proc/{server.process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert library not in maps.read_text()


def test_complete_asks_a_running_server(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["complete", "Once upon a time", "--url", f"http://127.0.0.1:{demo[1]}/v1"]
    assert main([*words, "--temperature", "0", "--max-tokens", "8"]) == 0
    first = capsys.readouterr()
    assert len(first.out.strip()) > 8
    assert "output 8 tokens" in first.err and "ended by length" in first.err
    assert "first text after" in first.err
    assert main([*words, "--temperature", "0", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == first.out


def test_complete_tells_what_the_server_says(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["complete", "a", "--url", f"http://127.0.0.1:{demo[1]}", "--model-name", "other"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "404 from http" in err and "'other' does not exist" in err and err.count("\n") == 1


def test_bench_serve_measures_a_running_server(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "serve", "--url", f"http://127.0.0.1:{demo[1]}", "--num-prompts", "6"]
    words += ["--random-input-len", "8", "--random-output-len", "5", "--request-rate", "50"]
    words += ["--max-concurrency", "3", "--goodput", "ttft:60000", "--save-detailed"]
    words += ["--result-dir", str(tmp_path), "--result-filename", "r.json"]
    assert main(words) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["completed"], results["failed"]) == (6, 0)
    assert (results["total_input_tokens"], results["total_output_tokens"]) == (48, 30)
    assert results["request_goodput"] == pytest.approx(results["request_throughput"])
    assert results["output_lens"] == [5] * 6 and results["max_concurrent_requests"] <= 3
    assert 0 < results["median_ttft_ms"] <= results["p99_e2el_ms"]
    out = capsys.readouterr().out
    assert "Serving Benchmark Result" in out and "P99 TPOT (ms):" in out


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_bench_serve_of_conversations(demo: Any, tmp_path: Path, endpoint: str) -> None:
    turns = [{"value": "Who are you, and what can you do?"}, {"value": "I am a demo model."}]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": turns}] * 3))
    words = ["bench", "serve", "--url", f"http://127.0.0.1:{demo[1]}", "--num-prompts", "3"]
    words += ["--dataset-name", "sharegpt", "--dataset-path", str(tmp_path / "d.json")]
    words += ["--endpoint", endpoint, "--sharegpt-output-len", "4", "--ignore-eos"]
    words += ["--result-filename", str(tmp_path / "r.json")]
    assert main(words) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["completed"], results["total_output_tokens"]) == (3, 12)


# --- Start ----------------------------------------------------------------------------------------


def test_it_answers_about_itself_before_the_engine_is_ready() -> None:
    port = free_port()
    with running("--port", str(port), NO_TEXT, "--served-model-name=a", fake=NEVER) as server:
        server.wait_for(lambda: answers(port, "/startup"))
        assert ask(port, "/startup")[0] == 200
        assert [card["id"] for card in ask(port, "/v1/models")[1]["data"]] == ["a"]
        assert ask(port, "/ready")[1]["error"]["code"] == "starting"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.out == []


def answers(port: int, path: str, status: int = 200) -> bool:
    """Whether a reply has this status; there may be none while the server starts or ends."""
    try:
        return ask(port, path)[0] == status
    except (OSError, http.client.HTTPException):
        return False


def test_a_port_in_use_is_told_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with running("--port", str(port), NO_TEXT, fake=FAKE) as server:
            assert server.wait() == 1
    assert server.err[-1] == (
        f"jaxserve serve: 127.0.0.1:{port} is in use; choose another with --port.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "256.1.1.1"], "can't listen on 256.1.1.1:8000"),
        (["--ssl-certfile", "none.pem"], "the TLS files can't be used"),
        (["--chat-template", "none.jinja"], "neither a file that can be read nor a template"),
        (["--tokenizer", "no/such/tokenizer", "--port", "0"], "No tokenizer could be loaded from"),
        (["--middleware", "no.such", "--port", "0", NO_TEXT], "can't be imported"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(words: list[str], message: str) -> None:
    with running(*words, fake=FAKE) as server:
        assert server.wait() == 1
    assert server.err[-1].startswith("jaxserve serve: ") and message in server.err[-1]
    assert not any("Traceback" in line for line in server.err)


def test_an_engine_that_cannot_start_ends_the_server() -> None:
    with running("--port", "0", NO_TEXT, fake={"start": "is refused"}) as server:
        assert server.wait() == 1
    assert any("no such model" in line for line in server.err)


def test_everybody_may_come_in_only_with_a_warning() -> None:
    with running("--port", "0", "--host", "0.0.0.0", NO_TEXT, fake=FAKE) as server:
        assert "http://127.0.0.1:" in server.wait_ready()
        assert any("WARNING: everybody who can reach this machine" in line for line in server.err)
    words = ("--port", "0", "--host", "0.0.0.0", "--api-key", "sk-hidden", NO_TEXT)
    with running(*words, fake=FAKE) as server:
        assert '-H "Authorization: Bearer $JAXSERVE_API_KEY"' in server.wait_ready()
    assert not any("WARNING" in line for line in server.err)
    assert not any("sk-hidden" in line for line in server.err + server.out)


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "server.pem")
    )
    port, pem = free_port(), str(tmp_path / "server.pem")
    with running("--port", str(port), "--ssl-certfile", pem, NO_TEXT, fake=FAKE) as server:
        assert f"https://127.0.0.1:{port}" in server.wait_ready()
        context = ssl.create_default_context()
        authority.configure_trust(context)
        connection = http.client.HTTPSConnection(
            "127.0.0.1", port, context=context, timeout=within(20)
        )
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()


def test_a_unix_socket_and_what_is_left_of_an_old_one() -> None:
    path = temporary_socket()
    for _ in range(2):
        with running("--uds", path, NO_TEXT, fake=FAKE) as server:
            curl = shlex.split(server.wait_ready())
            done = subprocess.run(
                [*curl, "-sf"], capture_output=True, check=True, timeout=within(30)
            )
            assert json.loads(done.stdout)["object"] == "text_completion"
            with running("--uds", path, NO_TEXT, fake=FAKE) as second:
                assert second.wait() == 1
            assert second.err[-1].endswith("is in use; choose another with --uds.\n")
        assert os.path.exists(path)  # it was killed; the next one takes its place
    with running("--uds", path, NO_TEXT, fake=FAKE) as server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not os.path.exists(path)


# --- End ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["1", "2"])
def test_sigterm_lets_running_requests_end_and_refuses_new_ones(count: str) -> None:
    port = free_port()
    words = ("--port", str(port), "--api-server-count", count, NO_TEXT)
    with running(*words, fake=FAKE) as server:
        server.wait_ready()
        family = server.descendants()
        assert len(family) == (1 if count == "1" else 3)
        requests = [in_background(port, 100) for _ in range(3)]
        server.wait_for(lambda: num_running(port) == 3)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: answers(port, "/ready", 503))
        status, reply = ask(port, "/v1/completions", completion(1))
        assert status == 503 and reply["error"]["code"] == "shutting_down"
        for thread, replies in requests:
            thread.join(within(30))
            assert replies[0][0] == 200
            assert replies[0][1]["usage"]["completion_tokens"] == 100
        assert server.wait() == 0
    assert not any(map(alive, family))


def test_sigterm_lets_a_stream_end() -> None:
    port = free_port()
    with running("--port", str(port), NO_TEXT, fake=FAKE) as server:
        server.wait_ready()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=within(30))
        body = completion(60) | {"stream": True, "return_token_ids": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        assert reply.readline().startswith(b"data: ")
        server.signal(signal.SIGTERM)
        rest = reply.read().decode()
        connection.close()
        assert server.wait() == 0
    assert rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_requests_that_take_too_long_are_ended_at_the_shutdown_timeout() -> None:
    port = free_port()
    words = ("--port", str(port), "--shutdown-timeout", "0.5", NO_TEXT)
    with running(*words, fake=FAKE) as server:
        server.wait_ready()
        thread, replies = in_background(port, 1000)
        wait_until_running(server, port)
        began = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert 0.4 < time.monotonic() - began < within(5)
        thread.join(within(30))
        assert replies  # it got an answer, or lost its connection
    assert not isinstance(replies[0], tuple) or replies[0][0] in (200, 503)


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_second_signal_exits_at_once_and_leaves_no_child(count: str) -> None:
    port = free_port()
    words = ("--port", str(port), "--api-server-count", count, NO_TEXT)
    with running(*words, fake=FAKE) as server:
        server.wait_ready()
        thread, _ = in_background(port, 1000)
        wait_until_running(server, port)
        family = server.descendants()
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: answers(port, "/ready", 503))
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < within(2)
        thread.join(within(30))
    poll(lambda: not any(map(alive, family)), 5)


def test_without_restart_a_dead_engine_ends_the_server() -> None:
    with running("--port", "0", "--no-restart", NO_TEXT, fake=FAKE) as server:
        server.wait_ready()
        (engine,) = server.descendants()
        engine.kill()
        assert server.wait() == 1


def test_a_dead_front_end_is_replaced() -> None:
    port = free_port()
    words = ("--port", str(port), "--api-server-count", "2", NO_TEXT)
    with running(*words, fake=FAKE) as server:
        server.wait_ready()
        fronts = [p for p in server.descendants() if "server.front_end" in p.cmdline()]
        fronts[1].kill()
        server.wait_for(lambda: any("it is started again" in line for line in server.err))
        server.wait_for(
            lambda: sum("server.front_end" in p.cmdline() for p in server.descendants()) == 2
        )
        assert ask(port, "/v1/completions", completion(2))[0] == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
