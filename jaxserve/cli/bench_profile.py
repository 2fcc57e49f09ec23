"""``jaxserve bench profile``: where the time of a step goes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from jaxserve.cli import bench_engine
from jaxserve.cli.flags import Parser

if TYPE_CHECKING:
    from jaxserve.bench.profile import Profile

HELP = "the kernels of a decode step, one by one"
INPUT_LEN = 128


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench profile [options]",
        description="Decodes some requests and lists the device's kernels by the time they take. "
        "CPUs tell no kernels: there only the step's time is shown.",
    )
    add = parser.add_argument
    add("--rows", type=int, default=1, metavar="N", help="requests that decode together")
    text = f"tokens of each one's context [default: {INPUT_LEN}, or what fits]"
    add("--input-len", type=int, metavar="N", help=text)
    add("--top", type=int, default=25, metavar="N", help="kernels to show")
    bench_engine.add_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Measures and prints."""
    bench_engine.check_positive(args, "rows", "input_len", "top")
    with bench_engine.engine(args) as llm:
        from jaxserve.bench.profile import LONG, TIMED_STEPS, profile

        outputs = max(LONG, 2 * TIMED_STEPS)
        defaults = (INPUT_LEN, outputs)
        length, _ = bench_engine.lengths_that_fit(llm, args.input_len, outputs, defaults)
        result = profile(llm, args.rows, length)
    bench_engine.write_json(args.output_json, dataclasses.asdict(result))
    print(_text(result, args.top))
    return 0


def _text(result: Profile, top: int) -> str:
    from jaxserve.bench.results import table

    head = f"{result.rows} rows: {result.step_ms:.3f} ms a step"
    if not result.kernels:
        return head
    launches = sum(kernel.count for kernel in result.kernels)
    head += f", {result.busy_ms:.3f} ms of it in {launches:.0f} kernels"
    rows = [["kernel", "runs", "µs each", "µs a step"]]
    for kernel in result.kernels[:top]:
        each, total = kernel.microseconds, kernel.count * kernel.microseconds
        rows.append([kernel.name[:70], f"{kernel.count:g}", f"{each:.2f}", f"{total:.1f}"])
    return f"{head}\n{table(rows)}"
