"""``jaxserve serve``: the server that speaks OpenAI's protocol."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from jsonargparse import Namespace

from jaxserve.cli import serve_flags
from jaxserve.cli.flags import Parser, server_extra

HELP = "serve a model over HTTP, with OpenAI's routes and a chat page"


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve serve [MODEL] [options]",
        description="Serves a model over HTTP with OpenAI's routes, and a chat page at /. Each "
        "flag may also stand in the environment, --max-model-len as JAXSERVE_MAX_MODEL_LEN, or "
        "in the YAML file of --config; flags come first, then the environment, then the file.",
        epilog="vLLM's other flags are accepted, too; those without effect say what replaces them.",
    )
    serve_flags.add_flags(parser)
    return parser


def arrange(words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command's words with those that the environment and ``--config`` add."""
    parser = make_parser()
    for line in serve_flags.misspelt(parser, environ):
        print(line, file=sys.stderr)
    return serve_flags.arrange(parser, words, environ)


def run(args: Namespace) -> int:
    """Serves until a signal comes; returns the exit code."""
    engine, server = serve_flags.configs(args)
    if args.print_config:
        print(serve_flags.as_yaml(engine, server), end="")
        return 0
    with server_extra():
        from server.serve import serve
    return serve(engine, server, serve_flags.changed(engine, server))
