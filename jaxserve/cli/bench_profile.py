"""``jaxserve bench profile``: where the time of a step or of a work goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from jaxserve.cli import bench_engine, bench_works
from jaxserve.cli.flags import Parser

if TYPE_CHECKING:
    from jaxserve.bench.profile import Kernel, Profile, WorkProfile
    from jaxserve.llm import LLM

HELP = "the kernels of a decode step or of a work, one by one"
INPUT_LEN = 128


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench profile [options]",
        description="Decodes some requests, or does a work of jaxserve bench works, and lists the "
        "device's kernels by the time they take. CPUs tell no kernels: there only the time of the "
        "step or work is shown.",
    )
    add = parser.add_argument
    add("--rows", type=int, default=1, metavar="N", help="requests that decode together")
    text = f"tokens of each one's context [default: {INPUT_LEN}, or what fits]"
    add("--input-len", type=int, metavar="N", help=text)
    text = "profile a work instead: " + ", ".join(bench_works.NAMES)
    add("--work", choices=bench_works.NAMES, metavar="NAME", help=text)
    add("--scale", type=float, default=1.0, metavar="X", help=bench_works.SCALE)
    add("--top", type=int, default=25, metavar="N", help="kernels to show")
    bench_engine.add_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Measures and prints."""
    bench_engine.check_positive(args, "rows", "input_len", "top")
    bench_works.check_scale(args)
    with bench_engine.engine(args) as llm:
        from jaxserve.bench.profile import profile_work

        work = args.work
        result = profile_work(llm, work, args.scale) if work else _profile_step(llm, args)
    bench_engine.write_json(args.output_json, dataclasses.asdict(result))
    print(_text(result, args.top))
    return 0


def _profile_step(llm: LLM, args: Namespace) -> Profile:
    from jaxserve.bench.profile import LONG, TIMED_STEPS, profile

    outputs = max(LONG, 2 * TIMED_STEPS)
    defaults = (INPUT_LEN, outputs)
    length, _ = bench_engine.lengths_that_fit(llm, args.input_len, outputs, defaults)
    return profile(llm, args.rows, length)


def _text(result: Profile | WorkProfile, top: int) -> str:
    from jaxserve.bench.profile import Profile

    launches = sum(kernel.count for kernel in result.kernels)
    if isinstance(result, Profile):
        head = f"{result.rows} rows: {result.step_ms:.3f} ms a step"
        busy, whole, unit = f"{result.busy_ms:.3f} ms", "µs a step", 1.0
    else:
        head = f"{result.work}: {result.seconds:.3f} s, {result.steps} steps, "
        head += f"{result.padding_waste:.1%} of the places padding"
        busy, whole, unit = f"{result.busy_seconds:.3f} s", "ms", 1e3
    if not result.kernels:
        return head
    return f"{head}, {busy} in {launches:.0f} kernels\n{_table(result.kernels[:top], whole, unit)}"


def _table(kernels: Sequence[Kernel], whole: str, unit: float) -> str:
    """``unit``: microseconds in one of the column ``whole``."""
    from jaxserve.bench.results import table

    rows = [["kernel", "runs", "µs each", whole]]
    for kernel in kernels:
        total = f"{kernel.total / unit:.1f}"
        rows.append([kernel.name[:70], f"{kernel.count:g}", f"{kernel.microseconds:.2f}", total])
    return table(rows)
