"""``jaxserve complete``: completes one prompt on a running server."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from jaxserve.cli import complete_client, flags
from jaxserve.cli.complete_client import Client
from jaxserve.cli.flags import Parser
from jaxserve.cli.generate import read_prompt
from jaxserve.cli.streaming import stream_served

HELP = "complete a prompt on a running server"


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve complete [PROMPT] [options]",
        description="Completes a prompt on a server that speaks OpenAI's protocol. The text goes "
        "to standard output as it comes, figures to standard error.",
    )
    text = "the text to go on with; - or none reads standard input"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", type=str, help=text)
    complete_client.add_flags(parser)
    flags.add_sampling_flags(parser, 256)
    return parser


def run(args: Namespace) -> int:
    """Asks, prints and reports."""
    body = flags.sampling_arguments(args) | {"prompt": read_prompt(args.prompt)}
    client = Client(args.url, args.api_key)
    body["model"] = args.model_name or client.model(None)["id"]
    answer = stream_served(client, "/v1/completions", body)
    print(flush=True)
    first = answer.first_after()
    after = "" if first is None else f", first text after {first:.2f} s"
    print(answer.summary() + after, file=sys.stderr)
    return 130 if answer.stopped else 0
