"""`jaxserve bench serve`: arrivals, figures and refusals. Runs on a server: test_cli_serve.py."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from jaxserve.__main__ import main
from jaxserve.bench import serving
from jaxserve.bench.serving import Outcome, Target, arrivals
from jaxserve.bench.workload import Item
from jaxserve.cli import bench_serve
from jaxserve.errors import ConfigError


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrivals(3, math.inf, 1.0, random.Random(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_wanted_mean_and_spread(burstiness: float) -> None:
    times = arrivals(20_000, 5.0, burstiness, random.Random(0))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(1 / 5, rel=0.05)
    # Of a gamma distribution; 1 is a Poisson process.
    assert statistics.stdev(gaps) == pytest.approx(1 / 5 / math.sqrt(burstiness), rel=0.05)


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_rates_must_be_positive(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        arrivals(1, rate, burstiness, random.Random(0))


SLOW = Outcome(10, start=0.0, output_len=3, ttft=0.5, itl=[0.1, 0.3], latency=0.9)
QUICK = Outcome(20, start=0.5, output_len=1, ttft=0.1, itl=[], latency=0.1)
FAILED = Outcome(30, start=0.0, error="500: no")


def test_the_figures_of_a_run() -> None:
    results = serving.summarize([SLOW, QUICK, FAILED], 2.0, (50, 99), {"ttft": 200})
    wanted = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 4,
        "request_throughput": 1.0,
        "request_goodput": 0.5,
        "output_throughput": 2.0,
        "total_token_throughput": 17.0,
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 300.0,
        "median_ttft_ms": 300.0,
        "mean_tpot_ms": 200.0,
        "std_tpot_ms": 0.0,
        "mean_itl_ms": 200.0,
        "p50_itl_ms": 200.0,
        "p99_itl_ms": 298.0,
        "mean_e2el_ms": 500.0,
    }
    assert {name: results[name] for name in wanted} == pytest.approx(wanted)


def test_goodput_needs_every_limit_and_a_short_answer_misses_no_tpot() -> None:
    def goodput(**limits: float) -> float:
        return serving.summarize([SLOW, QUICK], 1.0, goodput=limits)["request_goodput"]

    assert goodput(ttft=600) == 2
    assert goodput(ttft=600, tpot=100) == 1
    assert goodput(itl=200) == 1
    assert goodput(e2el=50) == 0


def test_a_run_in_which_all_failed_has_figures_too() -> None:
    results = serving.summarize([FAILED], 1.0)
    assert (results["completed"], results["mean_ttft_ms"]) == (0, 0.0)
    assert "Failed requests:" in serving.text(results, ["ttft"], (99,))


def test_the_table_is_vllms() -> None:
    results = serving.summarize([SLOW], 2.0, (99,), {"ttft": 1000})
    lines = serving.text(results, ["ttft", "tpot"], (99,)).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     1" in lines
    assert "Request goodput (req/s):                 0.50" in lines
    assert "---------------Time to First Token----------------" in lines
    assert "P99 TTFT (ms):                           500.00" in lines
    assert len(lines[-1]) == 50


# --- Against a server of our own ------------------------------------------------------------------


async def scripted(request: web.Request) -> web.StreamResponse:
    """Streams as many tokens as are wanted; refuses, breaks off or stays silent for some."""
    body = await request.json()
    prompt = body.get("prompt") or body["messages"][0]["content"]
    kind = prompt[0] if isinstance(prompt, list) else 0
    if kind == 1:
        return web.json_response({"error": {"message": "no"}}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if kind == 2:
        await response.write(b'data: {"error": {"message": "broken"}}\n\ndata: [DONE]\n\n')
    elif kind == 3:
        await response.write(b"data: [DONE]\n\n")
    else:
        for _ in range(body["max_tokens"]):
            await response.write(b': ping\n\ndata: {"choices": [{"text": "a"}]}\n\n')
            await asyncio.sleep(0.002)
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        await response.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
    await response.write_eof()
    return response


def drive(kinds: list[int], **options: Any) -> tuple[list[Outcome], float]:
    """Runs requests of the kinds of ``scripted``."""

    async def scene() -> tuple[list[Outcome], float]:
        app = web.Application()
        app.router.add_post("/v1/completions", scripted)
        app.router.add_post("/v1/chat/completions", scripted)
        async with TestServer(app) as server:
            target = Target(str(server.make_url(options.pop("path", "/v1/completions"))), "m")
            items = [Item([kind, 5], 4) for kind in kinds]
            times = options.pop("times", [0.0] * len(items))
            return await serving.drive(target, items, times, **options)

    return asyncio.run(scene())


def test_each_request_has_its_times_and_failures_do_not_stop_the_rest() -> None:
    outcomes, seconds = drive([0, 1, 2, 3])
    good = outcomes[0]
    assert (good.prompt_len, good.output_len, len(good.itl), good.error) == (2, 4, 3, "")
    assert 0 < good.ttft < good.latency <= seconds
    assert good.latency == pytest.approx(good.ttft + sum(good.itl))
    errors = [outcome.error for outcome in outcomes[1:]]
    assert errors[0].startswith("400: ") and "broken" in errors[1]
    assert errors[2] == "the stream ended without a chunk"


def test_no_more_run_at_once_than_allowed_and_none_before_its_time() -> None:
    outcomes, _ = drive([0] * 5, max_concurrency=2)
    assert serving.most_at_once(outcomes) == 2
    outcomes, _ = drive([0, 0], times=[0.0, 0.2])
    assert outcomes[1].start - outcomes[0].start >= 0.19


def test_the_chat_route_gets_messages() -> None:
    outcomes, _ = drive([0], path="/v1/chat/completions", prompts=["Hello"])
    assert outcomes[0].error == "" and outcomes[0].output_len == 4


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["--num-warmups", "-1"], "--num-warmups must not be negative"),
        (["--request-rate", "0"], "--request-rate and --burstiness must be positive"),
        (["--random-range-ratio", "1"], "--random-range-ratio must be at least 0"),
        (["--dataset-name", "sharegpt"], "--dataset-path FILE go together"),
        (["--goodput", "ttft"], "--goodput must be like ttft:200, got 'ttft'"),
        (["--goodput", "speed:3"], "got 'speed:3'"),
        (["--percentile-metrics", "ttft,x"], "got 'x'"),
        (["--metric-percentiles", "50,101"], "must be like 50,99"),
        (["--url", "http://x", "--start-server", ""], "either --url or --start-server"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_no_server_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    err = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:9" in err and err.count("\n") == 1


def test_names_that_stand_twice_agree() -> None:
    """The command line can't import what imports aiohttp."""
    assert tuple(serving.METRICS) == bench_serve.METRICS


def test_it_can_start_the_server_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    flags = "--max-num-seqs 2 --enforce-eager --log-level error"
    words = ["bench", "serve", "--start-server", flags, "--num-prompts", "2"]
    words += ["--random-input-len", "4", "--random-output-len", "3"]
    assert main([*words, "--result-filename", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 2
