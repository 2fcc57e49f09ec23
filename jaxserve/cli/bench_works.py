"""``jaxserve bench works``: the works of the published comparison with other engines."""

from __future__ import annotations

import datetime
import sys

from jsonargparse import Namespace

from jaxserve.cli import bench_engine
from jaxserve.cli.flags import Parser, UsageError

HELP = "the works of the published comparison: latency, batch64, throughput, prefill, mixed"
NAMES = ("latency", "batch64", "throughput", "prefill", "mixed")
SCALE = "make fewer requests and outputs, for slow machines; prompts stay as long"


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench works [options]",
        description="Runs the works that engines are compared by: random ids, greedy, no prefix "
        "caching, the best of two rounds. Without a model, random weights in llama1b's shape.",
    )
    add = parser.add_argument
    text = f"which, separated by commas, of {', '.join(NAMES)}"
    add("--works", type=str, default=",".join(NAMES), metavar="LIST", help=text)
    add("--scale", type=float, default=1.0, metavar="X", help=SCALE)
    text = "take the peers' numbers from a file of results, for example docs/benchmarks/h200.json"
    add("--peers", type=str, metavar="FILE", help=text)
    bench_engine.add_flags(parser)
    bench_engine.add_hardware_flags(parser)
    parser.set_defaults(max_model_len=4096, max_num_seqs=256, gpu_memory_utilization=0.85)
    return parser


def run(args: Namespace) -> int:
    """Measures and prints."""
    bench_engine.check_hardware_flags(args)
    names = args.works.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UsageError(f"--works knows {', '.join(NAMES)}, got {unknown[0]!r}.")
    check_scale(args)
    if args.model is None and args.model_shape is None:
        args.model_shape = "llama1b"

    from jaxserve.bench import works
    from jaxserve.bench.results import Results, result_table

    known = Results.load(args.peers) if args.peers is not None else Results(())
    results = []
    model = args.model_shape or args.model
    with bench_engine.engine(args) as llm:
        cost, hardware = bench_engine.cost_and_hardware(args, llm)
        machine = f"{bench_engine.device()}, {llm.dtype}"
        for name in names:
            peers = known.peers_of(model, name)
            result = works.run(llm, name, model, cost, hardware, args.scale, peers)
            results.append(result)
            if bench_engine.show_progress():
                print(f"{name}: {result.ours:,.3f} {result.unit}", file=sys.stderr)
    print(result_table(results))
    if args.output_json is not None:
        today = datetime.date.today().isoformat()
        Results(tuple(results), machine, today).save(args.output_json)
    return 0


def check_scale(args: Namespace) -> None:
    """Raises UsageError."""
    if not 0 < args.scale <= 1:
        raise UsageError("--scale must be above 0, at most 1.")
