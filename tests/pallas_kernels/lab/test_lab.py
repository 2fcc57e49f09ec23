"""The lab's commands, on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.lab.__main__ import main
from pallas_kernels.lab.measure import Setting, judge, save_winner, tune_case
from pallas_kernels.lab.ops import Candidate, find_candidate, find_op
from pallas_kernels.lab.report import rates, table
from pallas_kernels.lab.timing import Ceilings, InGraph, Inputs, Times, count_kernels
from tests.helpers import toy_linear

TOY = "tests.helpers.toy_linear:linear"
SLOW = Ceilings(copy=1e9, read=1e9, matmul=1e12)


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the real ones takes seconds."""
    monkeypatch.setattr(Ceilings, "measure", classmethod(lambda cls: SLOW))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for word in ("paged_attention: ", "decode, window", "8B decode 64x2048", "tunable"):
        assert word in text


def test_check_prints_seed_and_table_and_writes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", "fused_linear", "--implementation", "reference", "--cases", "row"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    found = rows(tmp_path)
    assert [row["case"] for row in found] == [
        "one row",
        "16 rows",
        "three rows, partial sums",
        "33 rows, gate",
    ]
    assert f"seed {found[0]['seed']}" in text
    assert "| fused_linear | reference | 16 rows | passed | " in text
    assert found[0]["repro"] == (
        "python -m pallas_kernels.lab check fused_linear --implementation reference "
        f"--cases 'one row' --seed {found[0]['seed']}"
    )
    assert found[0]["shape"]["rows"] == 1 and found[0]["jax"] == jax.__version__


def test_a_failure_is_said_with_its_command_and_by_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = TOY + '@{"repeats": 1, "fault": "wrong"}'
    command = ["check", "fused_linear", "--implementation", spec, "--cases", "plain"]
    assert main([*command, "--seed", "5"]) == 1
    text = capsys.readouterr().out
    assert "failed: values: output 0 has a relative error of 1 " in text
    assert "--cases plain --seed 5" in text and "failed: python -m pallas_kernels.lab" in text


@pytest.mark.parametrize(
    "words",
    [
        ["check", "no_op"],
        ["check", "fused_linear", "--implementation", "no_name"],
        ["check", "fused_linear", "--implementation", "reference", "--cases", "no case"],
        ["check", "fused_linear", "--implementation", 'reference@{"tile": 4}'],
        ["check", "fused_linear", "--implementation", TOY + '@{"tile": 4}'],
        ["tune", "fused_linear", "--implementation", "reference", "--cases", "plain"],
    ],
)
def test_what_does_not_exist_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("pallas_kernels.lab: ")


def test_time_gives_rates_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ["time", "rope_kv_write", "--implementation", "reference", "--cases", "plain"]
    assert main([*command, "--repeats", "3", "--out", str(tmp_path)]) == 0
    (row,) = rows(tmp_path)
    assert row["status"] == "passed" and row["kernels"] >= 1
    assert set(row["microseconds"]) == {"alone warm", "graph warm"}  # too small to be cold
    assert row["roof"] == "memory" and "BUG" not in row["flag"]
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    assert "| rope_kv_write | reference | plain |" in (tmp_path / "table.md").read_text()


def test_what_fails_is_not_timed(tmp_path: Path) -> None:
    spec = TOY + '@{"repeats": 1, "fault": "wrong"}'
    command = ["time", "fused_linear", "--implementation", spec, "--cases", "plain"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    (row,) = rows(tmp_path)
    assert row["status"] == "failed" and "microseconds" not in row


def test_more_than_the_roof_is_called_a_bug() -> None:
    op = find_op("paged_attention")
    (case,) = op.find_cases(True, "8B decode 64x2048")
    floor = op.cost(case).bytes / SLOW.bandwidth
    twice, half = (Times(seconds, seconds, seconds) for seconds in (2 * floor, floor / 2))
    assert rates(op, case, {"graph cold": twice, "graph warm": half}, SLOW)["flag"] == ""
    assert rates(op, case, {"graph cold": twice, "graph warm": half}, SLOW)["percent"] == 50
    found = rates(op, case, {"graph cold": half, "graph warm": half}, SLOW)
    assert found["flag"] == "BUG: 200 % of the roof"
    noisy = Times(half.median, -half.median, half.p90)
    assert "too noisy" in rates(op, case, {"graph warm": noisy}, SLOW)["flag"]


class CountedInGraph(InGraph):
    """Takes a microsecond for each repeat of the toy, whatever else the machine does."""

    def __init__(self, candidate: Candidate, *arguments: Any) -> None:
        super().__init__(candidate, *arguments)
        self._repeats = 64 if candidate.config is None else candidate.config.repeats

    def sample(self) -> float:
        return 1e-6 * self._repeats


def test_tune_enters_the_fastest_right_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pallas_kernels.lab.measure.InGraph", CountedInGraph)
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    command = ["tune", "fused_linear", "--implementation", TOY, "--cases", "plain"]
    words = ["--tuned", str(tuned), "--out", str(out), "--repeats", "3", "--budget", "60"]
    assert main([*command, *words]) == 0
    (entry,) = json.loads((tuned / "cpu.json").read_text())["fused_linear"][TOY].values()
    assert entry["config"] == {"repeats": 8, "fault": ""}
    assert entry["default_microseconds"] == pytest.approx(64)
    assert entry["microseconds"] == pytest.approx(8)
    found = {(row["config"] or {}).get("fault"): row for row in rows(out)}
    assert (found["wrong"]["status"], found["wrong"]["gate"]) == ("failed", "values")
    assert found["compile"]["message"] == "RuntimeError: this tile is too large"
    assert found["unsupported"]["status"] == "unsupported"


@pytest.mark.parametrize("otherwise_us", [4, 16])
def test_what_runs_only_by_an_entry_gets_none_where_others_are_faster(
    otherwise_us: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(CountedInGraph):
        def sample(self) -> float:
            return 1e-6 * (otherwise_us if self._repeats == 64 else self._repeats)

    monkeypatch.setattr("pallas_kernels.lab.measure.InGraph", Counted)
    op = find_op("fused_linear")
    mine = {"only_tuned": toy_linear.only_tuned, "reference": op.reference}
    op = dataclasses.replace(op, implementations=mine)
    (case,) = op.find_cases(False, "plain")
    setting = Setting(SLOW, seed=1, repeats=3, interpret=True)
    key, tried = tune_case(op, find_candidate(op, "only_tuned"), case, setting, 60)
    assert {row["implementation"] for row in tried} == set(mine)
    path = save_winner(tmp_path, key, tried)
    if otherwise_us < 8:
        assert tried[0]["implementation"] == "reference" and path is None
    else:
        assert path is not None
        (entry,) = json.loads(path.read_text())["fused_linear"]["only_tuned"].values()
        assert entry["default_microseconds"] == pytest.approx(otherwise_us)


def test_compare_tells_a_difference_from_noise() -> None:
    rng = np.random.default_rng(0)
    noise = 1 + 0.02 * rng.standard_normal((40, 3))
    equal = judge([tuple(row) for row in 10e-6 * noise])
    assert "no difference" in equal.verdict() and equal.noise < 0.02
    faster = judge([tuple(row) for row in 10e-6 * noise * (1, 0.9, 1)])
    assert faster.change == pytest.approx(-0.1, abs=0.02)
    assert faster.verdict().startswith("B is ") and "% faster, noise" in faster.verdict()


def test_compare_runs_both_and_keeps_the_command(tmp_path: Path) -> None:
    slow = TOY + '@{"repeats": 200}'
    command = ["compare", "fused_linear", "reference", slow, "--cases", "plain"]
    assert main([*command, "--repeats", "5", "--out", str(tmp_path)]) == 0
    (row,) = rows(tmp_path)
    assert row["change"] > 1 and "slower" in row["flag"]
    assert row["repro"].startswith("python -m pallas_kernels.lab compare fused_linear reference ")


@pytest.mark.parametrize("name", ["fused_linear", "rope_kv_write", "paged_attention"])
def test_no_call_of_a_program_is_merged_or_dropped(name: str) -> None:
    op = find_op(name)
    inputs = Inputs(op, op.cases[0], 1)
    inputs.sets = inputs.sets[:2]
    program = InGraph(find_candidate(op, "reference"), inputs, 4, interpret=True)
    program.compile()
    assert program.kernels >= 1
    assert np.isfinite(program.sample())


def test_kernels_are_counted_outside_of_fusions() -> None:
    module = (
        "HloModule step\n\n"
        "%fused_add (p: f32[4]) -> f32[4] {\n  ROOT %dot.1 = f32[4]{0} dot(%p, %p)\n}\n\n"
        "ENTRY %main (a: f32[4]) -> f32[4] {\n"
        "  %a = f32[4]{0} parameter(0)\n"
        "  %b = f32[4]{0} fusion(%a), calls=%fused_add\n"
        '  ROOT %c = (f32[4]{0}, s32[]) custom-call(%b), custom_call_target="x"\n}\n'
    )
    assert count_kernels(module) == 2


def test_the_table_names_the_configuration() -> None:
    row = {
        **dict.fromkeys(("op", "implementation", "case", "status", "gate", "message"), "x"),
        "config": {"warps": 4},
        "error": None,
    }
    assert 'x {"warps": 4}' in table([row], None)
