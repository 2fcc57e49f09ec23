"""``jaxserve bench`` on the command line, with small random models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.__main__ import main, make_parser
from jaxserve.bench import startup
from jaxserve.bench.profile import Kernel, Profile
from jaxserve.bench.results import Results
from jaxserve.bench.sweep import VARIED
from jaxserve.bench.works import SETTINGS, WORKS
from jaxserve.cli import bench_engine, bench_sweep, bench_works, flags
from jaxserve.cli.bench import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"jax", "jaxlib", "flax", "torch", "transformers", "tokenizers", "numpy", "matplotlib"}
SMALL = ("--model-shape", "tiny", "--enforce-eager", "--max-num-seqs", "4")
SMALL = (*SMALL, "--max-num-batched-tokens", "16")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom jaxserve.__main__ import main\n"
        f"for words in (['--help'], *([name, '--help'] for name in {list(COMMANDS)})):\n"
        "    try: main(['bench', *words])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        f"print('LOADED', sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")
    for text in (*COMMANDS, "usage: jaxserve bench latency", "--max-model-len N", "--seed N"):
        assert text in done.stdout


def test_names_that_stand_twice_agree() -> None:
    """The command line can't import the benchmarks, which import JAX."""
    assert tuple(WORKS) == bench_works.NAMES
    assert tuple(name.replace("_", "-") for name in VARIED) == bench_sweep.VARIED
    args = bench_works.make_parser().parse_args([])
    assert {name: args[name] for name in SETTINGS} == SETTINGS


def test_every_field_of_the_engine_has_a_flag() -> None:
    args = flags.with_dashes(["--seed=3", "--skip-tokenizer-init", "--block_size", "32"])
    parsed = COMMANDS["latency"].make_parser().parse_args(args)
    with bench_engine.engine_arguments(parsed) as arguments:
        assert (arguments["seed"], arguments["skip_tokenizer_init"]) == (3, True)
        assert (arguments["block_size"], arguments["model"]) == (32, None)
        assert arguments["enable_prefix_caching"] is False


def test_a_shape_is_a_directory_for_random_weights() -> None:
    args = COMMANDS["latency"].make_parser().parse_args(["--model-shape", "llama1b"])
    with bench_engine.engine_arguments(args) as arguments:
        directory = Path(arguments["model"])
        assert json.loads((directory / "config.json").read_text())["hidden_size"] == 2048
        assert (arguments["load_format"], arguments["skip_tokenizer_init"]) == ("dummy", True)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command: latency, throughput, serve, startup, sweep, works, profile, plot"),
        (["latency", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["latency", "--num-iters-warmup", "-1"], "--num-iters-warmup must not be negative"),
        (["latency", "--model-shape", "x"], "invalid choice: 'x'"),
        (["latency", "--model-shape", "tiny", "--model", "m"], "either --model or --model-shape"),
        (["throughput", "--dataset-name", "sharegpt"], "--dataset-path FILE go together"),
        (["throughput", "--random-range-ratio", "1"], "--random-range-ratio must be at least 0"),
        (
            ["throughput", "--dataset-name=sharegpt", "--dataset-path=f", "--model-shape=tiny"],
            "needs a tokenizer",
        ),
        (["sweep", "--values", "1,x"], "--values '1,x' must be integers"),
        (["sweep", "--values", "0"], "--values must be at least 1"),
        (["sweep", "--bandwidth", "3.9"], "needs both --bandwidth and --flops"),
        (["works", "--works", "latency,chess"], "got 'chess'"),
        (["works", "--scale", "2"], "--scale must be above 0"),
        (["startup", "--cold-cache", "--compilation-cache-dir", "x"], "give either --cold-cache"),
        (["plot"], "required: results"),
    ],
)
def test_a_wrong_command_line_gets_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", *words])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.err.startswith("jaxserve")


def test_latency_writes_vllms_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.json"
    words = ("--batch-size", "2", "--input-len", "4", "--output-len", "3")
    words = (*words, "--num-iters", "2", "--num-iters-warmup", "1", "--output-json", str(path))
    assert main(["bench", "latency", *SMALL, *words]) == 0
    results = json.loads(path.read_text())
    assert set(results) == {"avg_latency", "latencies", "percentiles"}
    assert len(results["latencies"]) == 2
    out = capsys.readouterr().out
    assert "2 x 4 tokens in, 3 out, 2 rounds" in out and "90th percentile" in out


def test_throughput_of_random_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "throughput.json"
    words = ("--num-prompts", "3", "--random-input-len", "6", "--random-output-len", "2")
    assert main(["bench", "throughput", *SMALL, *words, "--output-json", str(path)]) == 0
    results = json.loads(path.read_text())
    counts = ("num_requests", "num_prompt_tokens", "num_output_tokens", "total_num_tokens")
    assert [results[name] for name in counts] == [3, 18, 6, 24]
    assert "output tokens" in capsys.readouterr().out


def test_throughput_of_conversations_with_the_demo_model(tmp_path: Path) -> None:
    data, path = tmp_path / "data.json", tmp_path / "throughput.json"
    turns = [{"value": "Who are you, and what can you do?"}, {"value": "I am a demo model."}]
    data.write_text(json.dumps([{"conversations": turns}] * 2))
    words = ["--dataset-name", "sharegpt", "--dataset-path", str(data), "--enforce-eager"]
    words += ["--output-len", "2", "--max-num-seqs", "2", "--max-num-batched-tokens", "16"]
    assert main(["bench", "throughput", *words, "--output-json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert (results["num_requests"], results["num_output_tokens"]) == (2, 4)
    assert results["num_prompt_tokens"] >= 2 * 8


def test_default_lengths_shrink_for_short_contexts() -> None:
    short: Any = SimpleNamespace(config=SimpleNamespace(max_model_len=100))

    def fitted(*wanted: int | None) -> tuple[int, int]:
        return bench_engine.lengths_that_fit(short, *wanted, (1024, 128))

    assert fitted(None, None) == (75, 25)
    assert fitted(None, 40) == (60, 40)
    assert fitted(300, None) == (300, 25)  # what was asked for is tried, and refused


def test_sweep_writes_json_csv_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = ["--vary", "output-len", "--values", "2,4", "--batch-size", "2", "--input-len", "4"]
    words += ["--num-iters", "1", "--bandwidth", "0.01", "--flops", "0.1"]
    assert main(["bench", "sweep", *SMALL, *words, "--output", str(tmp_path / "new" / "s")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"s.csv", "s.json", "s.png"}
    plain = json.loads((tmp_path / "new" / "s.json").read_text())
    points = plain["points"]
    assert [(p["batch_size"], p["output_len"]) for p in points] == [(2, 2), (2, 4)]
    assert "tiny" in plain["title"] and "ms/token" in capsys.readouterr().out


def test_works_prints_each_result_beside_peers_and_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers, path = tmp_path / "peers.json", tmp_path / "works.json"
    entry = {"model": "tiny", "work": "latency", "unit": "ms/token", "better": "lower"}
    peers.write_text(json.dumps({"results": [entry | {"ours": 1, "peers": {"Peer": 2.5}}]}))
    words = ["--works", "latency,mixed", "--scale", "0.004", "--peers", str(peers)]
    words += ["--bandwidth", "0.01", "--flops", "0.1", "--output-json", str(path)]
    assert main(["bench", "works", *SMALL, *words]) == 0
    results = Results.load(path)
    assert [result.work for result in results.results] == ["latency", "mixed"]
    assert [result.peers for result in results.results] == [{"Peer": 2.5}, {}]
    assert all(result.floor for result in results.results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["jaxserve", "Peer", "floor", "share"]
    assert lines[2].split()[0] == "latency" and lines[3].split()[0] == "mixed"


def test_plot_draws_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    entry = {"model": "m", "work": "w", "unit": "s", "better": "lower", "ours": 2.0}
    path.write_text(json.dumps({"results": [entry]}))
    assert main(["bench", "plot", str(path)]) == 0
    assert (tmp_path / "r.png").exists()
    assert str(tmp_path / "r.png") in capsys.readouterr().out


# --- start-up -------------------------------------------------------------------------------------


def test_startup_measures_new_processes_with_an_empty_and_a_warm_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "startup.json"
    words = ["--model-shape", "tiny", "--max-num-seqs", "1", "--max-num-batched-tokens", "8"]
    assert main(["bench", "startup", *words, "--output-json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert list(results) == ["empty", "warm"]
    for result in results.values():
        names = [stage["name"] for stage in result["stages"]]
        wanted = {"python", "import", "device", "weights", "waiting for programs", "allocating"}
        assert wanted | {"first step"} == set(names)
        ends = [stage["start"] + stage["seconds"] for stage in result["stages"]]
        assert names[0] == "python" and max(ends) == pytest.approx(result["total"])
        assert result["complete"] >= result["total"]
        assert result["programs"] > 0 and result["compile_seconds"] > 0
    assert results["empty"]["cache_hits"] < results["empty"]["programs"]
    assert results["warm"]["cache_hits"] >= results["warm"]["programs"]
    out = capsys.readouterr().out
    assert "empty cache" in out and "warm cache" in out and "tracing and lowering" in out


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the processes that would be started."""
    arguments: list[dict[str, Any]] = []

    def child(given: dict[str, Any]) -> dict[str, Any]:
        arguments.append(given)
        return {"total": len(arguments)}

    monkeypatch.setattr(startup, "_child", child)
    return arguments


def test_cold_cache_starts_one_process_with_an_empty_directory(children: list) -> None:
    assert list(startup.measure({"model": "m"}, warm_too=False)) == ["empty"]
    assert list(startup.measure({"model": "m"}, warm_too=True)) == ["empty", "warm"]
    caches = [child["compilation_cache_dir"] for child in children]
    assert caches[1] == caches[2] != caches[0]
    assert not any(Path(cache).exists() for cache in caches)


def test_a_given_cache_is_used_as_it_is(children: list) -> None:
    assert list(startup.measure({"compilation_cache_dir": "c"}, warm_too=True)) == ["given"]
    assert children == [{"compilation_cache_dir": "c"}]


def test_a_process_that_fails_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "no/such/model", "--cold-cache"]
    assert main(["bench", "startup", *words]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the measured process failed" in err and "no/such" in err


def test_the_documented_commands_are_understood() -> None:
    text = (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("jaxserve ")]
    assert {words[1] for words in commands} == {"plot", "works", "startup", "sweep"}
    for words in commands:
        make_parser().parse_args(words)


def test_profile_tells_the_time_of_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CPU's profiler tells no kernels; ``Profile`` adds up those that others tell."""
    file = tmp_path / "out.json"
    command = ["bench", "profile", *SMALL, "--rows", "2", "--input-len", "4"]
    assert main([*command, "--output-json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["rows"] == 2 and result["kernels"] == []
    assert f"2 rows: {result['step_ms']:.3f} ms a step" in capsys.readouterr().out
    kernels = [Kernel("a", 2, 500.0), Kernel("b", 0.5, 2000.0)]
    assert Profile(2, 3.0, kernels).busy_ms == 2.0


def test_profile_tells_the_time_of_a_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    command = ["bench", "profile", *SMALL, "--work", "mixed", "--scale", "0.004"]
    assert main([*command, "--output-json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["seconds"] > 0 and result["steps"] > 0 and 0 < result["padding_waste"] < 1
    assert f"mixed: {result['seconds']:.3f} s, {result['steps']} steps" in capsys.readouterr().out
    assert main([*command, "--scale", "2"]) == 2
