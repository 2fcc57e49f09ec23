"""``jaxserve bench startup``: where the time from the command to the first token goes."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from jaxserve.cli import bench_engine
from jaxserve.cli.flags import Parser, UsageError

HELP = "the stages from a new process to its first token, with an empty and a warm compile cache"


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench startup [options]",
        description="Starts a new process with an empty compile cache (a temporary directory), "
        "then another that finds its programs there. With --compilation-cache-dir, the one "
        "process that uses that cache as it is.",
    )
    text = "only the start with an empty cache"
    parser.add_argument("--cold-cache", action="store_true", help=text)
    parser.add_argument(
        "--background",
        action="store_true",
        help="serve as soon as some request can be served, as jaxserve serve and generate do",
    )
    bench_engine.add_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Measures and prints."""
    if args.cold_cache and args.compilation_cache_dir is not None:
        raise UsageError("give either --cold-cache or --compilation-cache-dir.")
    from jaxserve.bench import startup

    with bench_engine.engine_arguments(args) as arguments:
        arguments |= {"warmup": "background" if args.background else "full"}
        results = startup.measure(arguments, warm_too=not args.cold_cache)
    bench_engine.write_json(args.output_json, results)
    print("\n\n".join(_text(name, result) for name, result in results.items()))
    return 0


def _text(name: str, result: dict[str, Any]) -> str:
    from jaxserve.bench.results import table

    rows = [["stage", "begins", "takes"]]
    for stage in result["stages"]:
        rows.append([stage["name"], f"{stage['start']:.2f} s", f"{stage['seconds']:.2f} s"])
    rows.append(["first token", "", f"{result['total']:.2f} s"])
    rows.append(["last program", "", f"{result['complete']:.2f} s"])
    programs = (
        f"{result['programs']} programs ({result['cache_hits']} found in the cache): "
        f"{result['lower_seconds']:.2f} s of tracing and lowering, "
        f"{result['compile_seconds']:.2f} s of compiling or reading, in several threads"
    )
    return f"{name} cache\n{table(rows)}\n{programs}"
