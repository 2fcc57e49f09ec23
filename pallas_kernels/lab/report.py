"""What the lab writes: rows of JSON, a Markdown table, a roofline picture."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.lab.gates import Verdict
from pallas_kernels.lab.ops import Candidate, Op
from pallas_kernels.lab.timing import Ceilings, Times
from pallas_kernels.tuning import device_kind

Row = dict[str, Any]


def row(
    command: str,
    op: Op,
    candidate: Candidate,
    case: Any,
    seed: int,
    verdict: Verdict,
    against: Candidate | None = None,
    **more: Any,
) -> Row:
    """One result as plain data, with the command that repeats it; ``more`` comes last."""
    names = ["--implementation", candidate.spec]
    if against is not None:
        names = [candidate.spec, against.spec]
    kind = "--benchmarks" if case in op.benchmarks else "--cases"
    words = ["python", "-m", "pallas_kernels.lab", command, op.name, *names]
    return {
        "command": command,
        "device": device_kind(),
        "jax": jax.__version__,
        "op": op.name,
        "implementation": candidate.name,
        "config": candidate.settings,
        "against": None if against is None else against.spec,
        "case": case.name,
        "shape": dataclasses.asdict(case),
        "seed": seed,
        **dataclasses.asdict(verdict),
        "repro": shlex.join([*words, kind, case.name, "--seed", str(seed)]),
        **more,
    }


def rates(op: Op, case: Any, times: Mapping[str, Times], ceilings: Ceilings) -> Row:
    """Times in microseconds, and how near the call in a program comes to what the device can do.

    ``percent`` is the time that the binding roof needs, as a share of the time taken. From cold
    memory more than 100 is impossible, so it is flagged: the cost, the ceilings or the clock is
    wrong. Inputs that stay in the cache may beat the memory's roof.
    """
    cost, cold = op.cost(case), "graph cold" in times
    seconds = times["graph cold" if cold else "graph warm"].median
    memory, compute = cost.bytes / ceilings.bandwidth, cost.flops / ceilings.matmul
    percent = 100 * max(memory, compute) / seconds
    flag = ""
    if min(one.p10 for one in times.values()) <= 0:
        flag = "too noisy: take more repeats, or a machine of its own"
    elif percent > 100 and (cold or compute >= memory):
        flag = f"BUG: {percent:.0f} % of the roof"
    elif not cold:
        flag = "inputs fit in the cache"
    return {
        "microseconds": {
            name: {k: v * 1e6 for k, v in dataclasses.asdict(t).items()}
            for name, t in times.items()
        },
        "bytes": cost.bytes,
        "flops": cost.flops,
        "GB/s": cost.bytes / seconds / 1e9,
        "TFLOP/s": cost.flops / seconds / 1e12,
        "percent": percent,
        "roof": "memory" if memory >= compute else "compute",
        "flag": flag,
    }


def append(folder: Path, rows: Sequence[Row]) -> None:
    """Appends to results.jsonl in the folder, so that what was measured outlives a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


def write(folder: Path, rows: Sequence[Row], ceilings: Ceilings | None) -> None:
    """Writes table.md, and if anything was timed roofline.png, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(rows, ceilings), encoding="utf-8")
    if ceilings is not None and any("percent" in one for one in rows):
        draw_roofline(folder / "roofline.png", rows, ceilings)


def table(rows: Sequence[Row], ceilings: Ceilings | None) -> str:
    """The results as a Markdown table, the ceilings below it."""
    timed = any("percent" in one for one in rows)
    head = ["op", "implementation", "case", "status", "error"]
    if timed:
        head += ["cold µs (p10–p90)", "warm µs", "alone µs", "kernels", "GB/s", "TFLOP/s", "%"]
        head += ["roof"]
    lines = [head, ["---"] * len(head)]
    for one in rows:
        error = "" if one["error"] is None else f"{one['error']:.1g}"
        name = one["implementation"]
        name += f" {json.dumps(one['config'])}" if one["config"] else ""
        cells = [one["op"], name, one["case"], _status(one), error]
        if "percent" in one:
            micros = one["microseconds"]
            cells += [_spread(micros.get("graph cold")), _median(micros.get("graph warm"))]
            cells += [_median(micros.get("alone warm")), f"{one['kernels']:g}"]
            cells += [f"{one['GB/s']:.0f}", f"{one['TFLOP/s']:.1f}", f"{one['percent']:.0f}"]
            cells += [one["roof"]]
        lines.append(cells + [""] * (len(head) - len(cells)))
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return text + (f"\n{describe(ceilings)}\n" if ceilings is not None else "")


def describe(ceilings: Ceilings) -> str:
    """The ceilings in words."""
    return (
        f"{device_kind()}, JAX {jax.__version__}; measured here: copy {ceilings.copy / 1e9:.0f} "
        f"GB/s, read {ceilings.read / 1e9:.0f} GB/s, bfloat16 matrix product "
        f"{ceilings.matmul / 1e12:.1f} TFLOP/s."
    )


def line(one: Row) -> str:
    """A result on one line, for the terminal."""
    words = [one["op"], one["implementation"], *([json.dumps(one["config"])] * bool(one["config"]))]
    text = f"{' '.join(words)} | {one['case']} | {_status(one)}"
    if "percent" in one:
        times = {name: _median(times) for name, times in one["microseconds"].items()}
        text += f" | µs {times} | {one['percent']:.0f} % of the {one['roof']} roof"
    return f"{text} | {one['took']:.1f} s" if "took" in one else text


def _status(one: Row) -> str:
    said = [one["status"], one["gate"], one["message"], one.get("flag", "")]
    return ": ".join(part for part in said if part).replace("|", "\\|").replace("\n", " ")


def _median(times: Mapping[str, float] | None) -> str:
    return "" if times is None else f"{times['median']:.1f}"


def _spread(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    return f"{times['median']:.1f} ({times['p10']:.1f}–{times['p90']:.1f})"


def draw_roofline(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Draws each result's FLOP/s over its FLOPs per byte, under the measured roofs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    timed = [one for one in rows if "percent" in one and one["flops"]]
    intensity = [one["flops"] / one["bytes"] for one in timed]
    ridge = ceilings.matmul / ceilings.bandwidth
    span = [min([*intensity, ridge]) / 2, ridge, max([*intensity, ridge]) * 2]
    roof = [min(x * ceilings.bandwidth, ceilings.matmul) / 1e12 for x in span]
    axes.plot(span, roof, color="black", label="measured roofs")
    for name in sorted({(one["op"], one["implementation"]) for one in timed}):
        points = [
            (x, one["TFLOP/s"])
            for x, one in zip(intensity, timed)
            if (one["op"], one["implementation"]) == name
        ]
        axes.plot(*zip(*points), "o", label=" ".join(name), alpha=0.7)
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Roofline, {device_kind()}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
