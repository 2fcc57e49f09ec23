"""``jaxserve bench``: how fast it is. The names are those of ``vllm bench`` where it has them."""

from __future__ import annotations

from jsonargparse import Namespace

from jaxserve.cli import (
    bench_latency,
    bench_plot,
    bench_profile,
    bench_serve,
    bench_startup,
    bench_sweep,
    bench_throughput,
    bench_works,
)
from jaxserve.cli.flags import Parser

HELP = "measure latency, throughput and start-up, and draw them"
COMMANDS = {
    "latency": bench_latency,
    "throughput": bench_throughput,
    "serve": bench_serve,
    "startup": bench_startup,
    "sweep": bench_sweep,
    "works": bench_works,
    "profile": bench_profile,
    "plot": bench_plot,
}


def make_parser() -> Parser:
    """The flags of the command."""
    return Parser(
        usage="jaxserve bench COMMAND [options]",
        description="Benchmarks of one engine in this process, or of a server. They measure, and "
        "judge nothing.",
        epilog="jaxserve bench COMMAND --help shows the flags of a command.",
    )


def run(args: Namespace) -> int:
    """Runs the subcommand."""
    return COMMANDS[args.command].run(args[args.command])
