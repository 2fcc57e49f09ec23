"""``jaxserve complete``: completes one prompt on a running server."""

from __future__ import annotations

import sys
import time
from typing import Any

from jsonargparse import Namespace

from jaxserve.cli import complete_client, flags
from jaxserve.cli.complete_client import Client
from jaxserve.cli.flags import Parser
from jaxserve.cli.generate import read_prompt
from jaxserve.cli.interrupt import Stopped, interruptible

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
    body["model"] = args.model_name or client.models()[0]["id"]
    body["stream_options"] = {"include_usage": True}
    usage: dict[str, Any] = {}
    started, first, reason = time.perf_counter(), None, "stopped"
    with interruptible() as interrupt:
        try:
            for chunk in client.stream("/v1/completions", body):
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    first = first or time.perf_counter()
                    print(choice["text"], end="", flush=True)
                    reason = choice.get("finish_reason") or reason
                interrupt.check()
        except Stopped:
            pass
    print(flush=True)
    print(_figures(usage, reason, started, first), file=sys.stderr)
    return 130 if reason == "stopped" else 0


def _figures(usage: dict[str, Any], reason: str, started: float, first: float | None) -> str:
    words = [f"ended by {reason}" if reason != "stopped" else reason]
    if usage:
        prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
        words.insert(0, f"prompt {prompt} tokens, output {output} tokens")
    if first is not None:
        words.append(f"first text after {first - started:.2f} s")
    return ", ".join(words)
