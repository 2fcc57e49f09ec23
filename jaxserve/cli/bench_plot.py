"""``jaxserve bench plot``: bars of measured results."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from jaxserve.cli.flags import Parser

HELP = "draw a file of results as bars: ours, the peers', the floor"


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench plot RESULTS.json [options]",
        description="Draws a file of results, as bench works --output-json writes it and "
        "jaxserve/bench/results.py describes it. Prints it as a table, too.",
    )
    parser.add_argument("results", metavar="RESULTS.json", type=str, help="what was measured")
    text = "the picture, .png or .svg [default: the file's name with .png]"
    parser.add_argument("--output", type=str, metavar="FILE", help=text)
    return parser


def run(args: Namespace) -> int:
    """Draws and prints."""
    from jaxserve.bench import plot
    from jaxserve.bench.results import Results, result_table

    results = Results.load(args.results)
    path = Path(args.output or Path(args.results).with_suffix(".png"))
    plot.bars(results, path)
    print(result_table(results.results))
    print(path)
    return 0
