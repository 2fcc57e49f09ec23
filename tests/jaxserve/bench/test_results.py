"""Files of results: read, checked, shown as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.bench.results import Result, Results, number, result_table, table
from jaxserve.bench.works import WORKS
from jaxserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
LATENCY = {
    "model": "m",
    "work": "latency",
    "unit": "ms/token",
    "better": "lower",
    "ours": 5.0,
    "peers": {"A": 6.0, "B": 4.0},
    "floor": 2.5,
}
RATE = {"model": "m", "work": "rate", "unit": "tok/s", "better": "higher", "ours": 1200}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    results = Results((Result(**LATENCY), Result(**RATE)), "a GPU", "2026-11-21")
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results


def test_shares_and_leads_look_at_what_is_better() -> None:
    low = Result(**LATENCY)
    assert (low.share, low.lead) == (0.5, 0.8)
    high = Result(**RATE | {"floor": 2400, "peers": {"A": 1000}})
    assert (high.share, high.lead) == (0.5, 1.2)
    assert (Result(**RATE).share, Result(**RATE).lead) == (None, None)


def test_peers_are_found_by_model_and_work() -> None:
    results = Results((Result(**LATENCY), Result(**RATE)))
    assert results.peers_of("m", "latency") == {"A": 6.0, "B": 4.0}
    assert results.peers_of("m", "rate") == {}
    assert results.peers_of("n", "latency") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no file of results"),
        ({}, "no file of results: 'results'"),
        ({"results": [{"model": "m"}]}, "no file of results"),
        ({"results": [RATE | {"colour": 1}]}, "colour"),
        ({"results": [RATE | {"better": "bigger"}]}, "better='bigger'"),
        ({"results": [RATE | {"ours": "fast"}]}, "rate: ours='fast'"),
        ({"results": [RATE | {"floor": 0}]}, "rate: floor=0"),
        ({"results": [RATE | {"peers": [1]}]}, "peers="),
    ],
)
def test_other_files_are_refused_with_the_reason(
    content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        Results.load(write(tmp_path / "r.json", content))
    assert message in str(error.value)


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        Results.load(tmp_path / "none.json")


def test_numbers_keep_what_matters() -> None:
    shown = [number(value) for value in (None, 0.63581, 12.69, 999.6, 10_075.4)]
    assert shown == ["-", "0.6358", "12.69", "999.6", "10,075"]


def test_the_table_puts_peers_and_floor_beside_ours() -> None:
    lines = result_table([Result(**LATENCY), Result(**RATE)]).splitlines()
    assert lines[0].split() == ["work", "model", "unit", "jaxserve", "A", "B", "floor", "share"]
    assert lines[2].split() == ["latency", "m", "ms/token", "5", "6", "4", "2.5", "50%"]
    assert lines[3].split() == ["rate", "m", "tok/s", "1,200", "-", "-", "-"]


def test_tables_align() -> None:
    assert table([["a", "bb"], ["ccc", "1"]]) == "a    bb\n-------\nccc   1"


def test_the_published_results_are_of_our_works() -> None:
    results = Results.load(ROOT / "docs" / "benchmarks" / "h200.json").results
    assert len(results) == len({(result.model, result.work) for result in results})
    for result in results:
        if result.work in WORKS:
            work = WORKS[result.work]
            assert (result.unit, result.better) == (work.unit, work.better)
        assert result.source
        assert result.share is None or result.share < 1
