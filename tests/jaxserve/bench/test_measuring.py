"""The benchmarks on a small engine with random weights."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.bench import measure, sweep, works
from jaxserve.bench.floors import Costs, Hardware, costs
from jaxserve.bench.shapes import write_shape
from jaxserve.bench.workload import Item
from jaxserve.errors import ConfigError
from tests.helpers.engines import small_llm

HARDWARE = Hardware(1e11, 1e14)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = tmp_path_factory.mktemp("tiny")
    write_shape("tiny", directory)
    with small_llm(directory, load_format="dummy", max_model_len=2304) as llm:
        yield llm


@pytest.fixture(scope="module")
def cost(llm: LLM) -> Costs:
    return costs(llm.model_config, llm.dtype)


@pytest.fixture
def asked(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What is asked of ``generate`` in a test."""
    calls = []
    generate = llm.generate

    def noted(prompts: Any, params: Any, **options: Any) -> Any:
        calls.append((prompts, params))
        return generate(prompts, params, **options)

    monkeypatch.setattr(llm, "generate", noted)
    return calls


def test_latency_takes_the_same_batch_again_and_again(llm: LLM, asked: list) -> None:
    items = [Item([20, 21, 22], 4), Item([30], 2)]
    results = measure.latency(llm, items, 2, 3, temperature=0.5)
    assert len(asked) == 2 + 3
    for prompts, params in asked:
        assert [prompt["prompt_token_ids"] for prompt in prompts] == [[20, 21, 22], [30]]
        wanted = {"temperature": 0.5, "ignore_eos": True, "detokenize": False}
        assert params == [SamplingParams(max_tokens=n, **wanted) for n in (4, 2)]
    latencies = results["latencies"]
    assert set(results) == {"avg_latency", "latencies", "percentiles"}
    assert results["avg_latency"] == pytest.approx(sum(latencies) / 3)
    assert list(results["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert results["percentiles"]["50"] == sorted(latencies)[1]
    json.dumps(results)


def test_throughput_counts_requests_and_tokens(llm: LLM) -> None:
    results = measure.throughput(llm, [Item([20] * 5, 3), Item([20] * 7, 2)])
    seconds = results["elapsed_time"]
    assert seconds > 0
    assert results == {
        "elapsed_time": seconds,
        "num_requests": 2,
        "total_num_tokens": 17,
        "requests_per_second": 2 / seconds,
        "tokens_per_second": 17 / seconds,
        "num_prompt_tokens": 12,
        "num_output_tokens": 5,
        "output_tokens_per_second": 5 / seconds,
    }


def test_an_engine_that_gives_fewer_tokens_is_found_out(llm: LLM, monkeypatch) -> None:
    monkeypatch.setattr(measure, "SamplingParams", lambda **k: SamplingParams(max_tokens=1))
    with pytest.raises(RuntimeError, match="1 tokens came, 5 were asked for"):
        measure.seconds(llm, [Item([20], 5)])


# --- works ----------------------------------------------------------------------------------------


def test_the_works_are_those_that_were_published() -> None:
    """Their lengths may not change, or the published numbers mean nothing."""
    lengths = {name: work.lengths(1.0) for name, work in works.WORKS.items()}
    assert lengths["latency"] == [(128, 256)]
    assert lengths["batch64"] == [(128, 256)] * 64
    assert lengths["throughput"] == [(512, 256)] * 512
    assert lengths["prefill"] == [(2048, 1)] * 64
    mixed = lengths["mixed"]
    assert (len(mixed), *map(sum, zip(*mixed))) == (1000, 190_625, 192_488)
    assert mixed[:3] == [(214, 146), (425, 334), (75, 393)]


@pytest.mark.parametrize("name", works.WORKS)
def test_each_work_gives_a_result_beside_its_floor(llm: LLM, cost: Costs, name: str) -> None:
    result = works.run(llm, name, "tiny", cost, HARDWARE, 0.005, {"Peer": 7.0})
    work = works.WORKS[name]
    assert (result.work, result.model, result.unit) == (name, "tiny", work.unit)
    assert result.peers == {"Peer": 7.0}
    assert result.share is not None and 0 < result.share < 1


def test_a_work_warms_up_and_takes_the_best_of_two_rounds(
    llm: LLM, cost: Costs, asked: list
) -> None:
    result = works.run(llm, "mixed", "tiny", cost, None, 0.016, {})
    assert [len(prompts) for prompts, _ in asked] == [2, 16, 16]
    assert asked[1][0] != asked[2][0]  # new prompts each round
    assert result.floor is None


# --- sweep ----------------------------------------------------------------------------------------


def test_a_point_of_a_sweep(llm: LLM, cost: Costs, asked: list, tmp_path: Path) -> None:
    setting = {"batch_size": 3, "input_len": 5, "output_len": 4}
    point = sweep.run(llm, setting, cost, HARDWARE, num_iters=2, seed=0)
    assert [len(prompts) for prompts, _ in asked] == [3] * 3
    assert (point.batch_size, point.input_len, point.output_len) == (3, 5, 4)
    assert point.tokens_per_second == pytest.approx(12 / point.seconds)
    assert point.ms_per_token == pytest.approx(point.seconds * 1e3 / 4)
    assert point.floor_ms_per_token is not None
    assert 0 < point.floor_ms_per_token < point.ms_per_token
    without = sweep.run(llm, setting, cost, None, 1, 0)
    assert without.floor_ms_per_token is None

    sweep.write_csv(tmp_path / "s.csv", [point, without])
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["batch_size"] for row in rows] == ["3", "3"]
    assert list(rows[0]) == [field.name for field in dataclasses.fields(sweep.Point)]


def test_peers_curves_are_read(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    entries = [{"ms_per_token": 2, "tokens_per_second": 500, "batch_size": 1}]
    path.write_text(json.dumps({"A": entries}))
    assert sweep.read_peers(str(path)) == {"A": [(2.0, 500.0)]}
    path.write_text(json.dumps({"A": [{"ms_per_token": 2}]}))
    with pytest.raises(ConfigError, match="no file of peers' curves"):
        sweep.read_peers(str(path))
