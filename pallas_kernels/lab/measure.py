"""The lab's measurements: time, compare, tune. Nothing is timed before it has passed its gates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.lab import gates, report
from pallas_kernels.lab.ops import Candidate, Op
from pallas_kernels.lab.report import Row
from pallas_kernels.lab.timing import Ceilings, InGraph, Inputs, Times, alone, calls_for, jitted

LAUNCH = 100e-6
"""Seconds of a call alone that may be the host's."""


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        ceilings: of this device.
        seed: of the inputs.
        repeats: samples per time.
        interpret: runs Pallas kernels on a CPU.
    """

    ceilings: Ceilings
    seed: int
    repeats: int
    interpret: bool

    def floor(self, op: Op, case: Any) -> float:
        """Seconds that the case takes at least."""
        cost = op.cost(case)
        return max(cost.bytes / self.ceilings.bandwidth, cost.flops / self.ceilings.matmul)


def time_case(op: Op, candidate: Candidate, case: Any, setting: Setting) -> Row:
    """Checks an implementation on a case, and if it passes takes its times."""
    verdict = gates.check(op, candidate, case, setting.seed, setting.interpret)
    more: Row = {}
    if verdict.status == "passed":
        times, kernels = _times(op, candidate, case, setting)
        more = report.rates(op, case, times, setting.ceilings) | {"kernels": kernels}
    return report.row("time", op, candidate, case, setting.seed, verdict, **more)


def _times(
    op: Op, candidate: Candidate, case: Any, setting: Setting
) -> tuple[dict[str, Times], float]:
    """The times by name, and the kernels of a call."""
    repeats, interpret = setting.repeats, setting.interpret
    rotating = Inputs(op, case, setting.seed)
    inputs = {"warm": rotating.warm()} | ({"cold": rotating} if rotating.cold else {})
    run = jitted(candidate, rotating, interpret)
    times = {f"alone {name}": alone(run, one, repeats) for name, one in inputs.items()}
    calls = calls_for(max(setting.floor(op, case), times["alone warm"].median - LAUNCH))
    programs = {name: InGraph(candidate, one, calls, interpret) for name, one in inputs.items()}
    with ThreadPoolExecutor(len(programs)) as pool:
        list(pool.map(InGraph.compile, programs.values()))
    for name, program in programs.items():
        times[f"graph {name}"] = program.measure(repeats)
    return times, programs["warm"].kernels


# --- two implementations against each other -----------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """B against A.

    Attributes:
        change: B's time over A's, less 1.
        noise: what this measurement can't tell from 0.
        seconds: medians of A and B.
    """

    change: float
    noise: float
    seconds: tuple[float, float]

    def verdict(self) -> str:
        """It in words."""
        if abs(self.change) <= self.noise:
            return f"no difference (B {self.change:+.1%}, noise {self.noise:.1%})"
        word = "faster" if self.change < 0 else "slower"
        return f"B is {abs(self.change):.1%} {word}, noise {self.noise:.1%}"


def judge(rounds: Sequence[tuple[float, float, float]]) -> Comparison:
    """Compares from rounds of (A, B, A again) in seconds.

    The noise is what A differs from itself: the median of its changes within a round, or twice that
    median's standard error, estimated from the changes' median absolute deviation.
    """
    first, b, second = np.array(rounds).T
    change = float(np.median(b / ((first + second) / 2))) - 1
    own = second / first - 1
    middle = float(np.median(own))
    deviation = 1.4826 * float(np.median(np.abs(own - middle)))
    noise = max(abs(middle), 2 * 1.2533 * deviation / len(rounds) ** 0.5)
    return Comparison(change, noise, (float(np.median([first, second])), float(np.median(b))))


def compare_case(op: Op, a: Candidate, b: Candidate, case: Any, setting: Setting) -> Row:
    """Times A, B and A again, over and over, from cold memory where the inputs are large enough."""
    for candidate in (a, b):
        verdict = gates.check(op, candidate, case, setting.seed, setting.interpret)
        if verdict.status != "passed":
            return report.row("compare", op, candidate, case, setting.seed, verdict, b)
    inputs = Inputs(op, case, setting.seed)
    calls = calls_for(2 * setting.floor(op, case))
    programs = [InGraph(each, inputs, calls, setting.interpret) for each in (a, b)]
    for program in programs:
        program.compile()
        program.sample()
    one, other = programs
    rounds = [(one.sample(), other.sample(), one.sample()) for _ in range(setting.repeats)]
    outcome = judge(rounds)
    more = {
        "change": outcome.change,
        "noise": outcome.noise,
        "microseconds": [seconds * 1e6 for seconds in outcome.seconds],
        "flag": outcome.verdict(),
    }
    return report.row("compare", op, a, case, setting.seed, verdict, b, **more)


# --- the best configuration ---------------------------------------------------------------------


def tune_case(
    op: Op, candidate: Candidate, case: Any, setting: Setting, seconds: float
) -> tuple[str, list[Row]]:
    """Tries an implementation's configurations on a case, for so many seconds.

    All are compiled in threads; what compiled is timed one by one; the fastest that passes the
    gates wins. Where the implementation runs only if the table has an entry for the case, it
    competes with what runs otherwise.

    Returns:
        The case's key in the table, and a row per configuration: first the winner if there is one,
        then the other timed ones, then those that failed.
    """
    end = time.monotonic() + seconds
    inputs = Inputs(op, case, setting.seed)
    calls = calls_for(2 * setting.floor(op, case))
    tries = [candidate, *candidate.configured(inputs.arguments)]
    programs = [InGraph(one, inputs, calls, setting.interpret) for one in tries]
    pool = ThreadPoolExecutor(max(1, min(16, (os.cpu_count() or 2) // 2)))
    compiled = [pool.submit(program.compile) for program in programs]
    wait(compiled, timeout=max(0.0, 0.7 * seconds))
    pool.shutdown(cancel_futures=True)
    timed, failed = [], []
    for one, program, future in zip(tries, programs, compiled):
        problem = _problem(future, end)
        if problem is None:
            timed.append((program.measure(setting.repeats), one))
        else:
            failed.append(report.row("tune", op, one, case, setting.seed, problem))
    rival = _rival(op, candidate, inputs, calls, setting) if _lacks_entry(compiled[0]) else None
    if rival is not None:
        one, program = rival
        timed.append((program.measure(setting.repeats), one))
    rows: list[Row] = []
    for times, one in sorted(timed, key=lambda pair: pair[0].median):
        verdict = gates.Verdict("skipped", message="slower than the winner, not checked")
        if not any(row["status"] == "passed" for row in rows):
            verdict = gates.check(op, one, case, setting.seed, setting.interpret)
        more: Row = {"microseconds": times.median * 1e6, "flag": f"{times.median * 1e6:.1f} µs"}
        rows.append(report.row("tune", op, one, case, setting.seed, verdict, **more))
    rows.sort(key=lambda row: row["status"] != "passed")
    return candidate.tuning_key(inputs.arguments), rows + failed


def _lacks_entry(default: Future[None]) -> bool:
    """Whether the implementation can't run without a configuration."""
    return not default.cancelled() and isinstance(default.exception(), NotImplementedError)


def _rival(
    op: Op, candidate: Candidate, inputs: Inputs, calls: int, setting: Setting
) -> tuple[Candidate, InGraph] | None:
    """What runs in an implementation's place, and its program, compiled; None if nobody knows."""
    names = list(op.implementations)
    place = names.index(candidate.name) + 1 if candidate.name in names else len(names)
    for name in names[place:]:
        one = Candidate(name, op.implementations[name])
        program = InGraph(one, inputs, calls, setting.interpret)
        try:
            program.compile()
        except NotImplementedError:
            continue
        return one, program
    return None


def _problem(future: Future[None], end: float) -> gates.Verdict | None:
    """Why a configuration is not timed; None if it can be."""
    if future.cancelled() or time.monotonic() > end:
        return gates.Verdict("skipped", message="not tried: out of time")
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, NotImplementedError):
        return gates.Verdict("unsupported", message=str(error))
    return gates.Verdict("failed", "it compiles", f"{type(error).__name__}: {error}"[:500])


def save_winner(folder: Path, key: str, rows: Sequence[Row]) -> Path | None:
    """Enters the winner of ``tune_case`` into its device's table; None if the default or another
    implementation won, or nothing did."""
    winner = rows[0] if rows and rows[0]["status"] == "passed" else None
    if winner is None or winner["config"] is None:
        return None
    path = tuning.path(winner["device"], folder)
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    default = [row.get("microseconds") for row in rows if row["config"] is None]
    entry = {
        "config": winner["config"],
        "microseconds": round(winner["microseconds"], 2),
        "default_microseconds": round(default[0], 2) if default and default[0] else None,
        "jax": jax.__version__,
        "case": winner["case"],
    }
    tables.setdefault(winner["op"], {}).setdefault(winner["implementation"], {})[key] = entry
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path
