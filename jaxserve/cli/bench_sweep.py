"""``jaxserve bench sweep``: one engine at several batch sizes or lengths, and a picture of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from jaxserve.cli import bench_engine
from jaxserve.cli.flags import Parser, UsageError

if TYPE_CHECKING:
    from jaxserve.bench.sweep import Point

HELP = "tokens per second against time per token, over batch sizes or lengths"
VARIED = ("batch-size", "input-len", "output-len")


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench sweep [options]",
        description="Runs batches of several sizes (or lengths) in one engine and writes "
        "NAME.json, NAME.csv and NAME.png. The prompts are random, decoding is greedy.",
    )
    add = parser.add_argument
    text = f"what changes from point to point: {', '.join(VARIED)}"
    add("--vary", choices=VARIED, default=VARIED[0], metavar="WHAT", help=text)
    text = "its values, separated by commas"
    add("--values", type=str, default="1,2,4,8,16,32", metavar="LIST", help=text)
    add("--batch-size", type=int, default=8, metavar="N", help="requests given at once")
    add("--input-len", type=int, default=128, metavar="N", help="tokens of a prompt")
    add("--output-len", type=int, default=128, metavar="N", help="tokens to generate for each")
    add("--num-iters", type=int, default=3, metavar="N", help="rounds, of which the best counts")
    add("--output", type=str, default="sweep", metavar="NAME", help="path without an ending")
    text = '{"vLLM": [{"ms_per_token": x, "tokens_per_second": y}, ...]}, drawn beside ours'
    add("--peers", type=str, metavar="FILE", help=text)
    add("--no-plot", action="store_true", help="draw nothing")
    bench_engine.add_flags(parser)
    bench_engine.add_hardware_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Measures, writes and draws."""
    bench_engine.check_positive(args, "batch_size", "input_len", "output_len", "num_iters")
    bench_engine.check_hardware_flags(args)
    values, varied = _values(args["values"]), args.vary.replace("-", "_")
    setting = {name.replace("-", "_"): args[name.replace("-", "_")] for name in VARIED}

    from jaxserve.bench import plot, sweep
    from jaxserve.bench.results import number, table

    peers = sweep.read_peers(args.peers) if args.peers is not None else {}
    if not args.no_plot:
        plot.check()
    points = []
    with bench_engine.engine(args) as llm:
        cost, hardware = bench_engine.cost_and_hardware(args, llm)
        title = f"{args.model_shape or args.model or 'demo model'}, {bench_engine.device()}"
        for value in values:
            at = setting | {varied: value}
            points.append(sweep.run(llm, at, cost, hardware, args.num_iters, args.seed))
            if bench_engine.show_progress():
                print(f"{args.vary} {value}: {points[-1].seconds:.2f} s", file=sys.stderr)
    rows = [["batch", "in", "out", "s", "out tok/s", "ms/token", "floor"]]
    for point in points:
        sizes = [str(point.batch_size), str(point.input_len), str(point.output_len)]
        rates = [number(point.tokens_per_second), number(point.ms_per_token)]
        rows.append([*sizes, f"{point.seconds:.3f}", *rates, number(point.floor_ms_per_token)])
    print(table(rows))
    for path in _write(args, title, varied, points, peers):
        print(path)
    return 0


def _write(
    args: Namespace,
    title: str,
    varied: str,
    points: list[Point],
    peers: dict[str, list[tuple[float, float]]],
) -> list[Path]:
    from jaxserve.bench import plot, sweep

    paths = [Path(f"{args.output}.{ending}") for ending in ("json", "csv", "png")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    plain = {"title": title, "points": [dataclasses.asdict(point) for point in points]}
    bench_engine.write_json(str(paths[0]), plain)
    if args.output_json is not None:
        bench_engine.write_json(args.output_json, plain)
    sweep.write_csv(paths[1], points)
    if args.no_plot:
        return paths[:2]
    plot.curve(points, varied, title, peers, paths[2])
    return paths


def _values(text: str) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--values {text!r} must be integers separated by commas.") from None
    if min(values) < 1:
        raise UsageError("--values must be at least 1.")
    return values
