"""The ``jaxserve`` command. A composition root; the subcommands live in ``jaxserve.cli``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from jaxserve import __version__
from jaxserve.cli import (
    bench,
    cache,
    chat,
    complete,
    convert,
    doctor,
    flags,
    generate,
    plan,
    run_batch,
    serve,
)
from jaxserve.cli.completion import PrintCompletion
from jaxserve.errors import JaxserveError

COMMANDS: dict[str, Any] = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "complete": complete,
    "run-batch": run_batch,
    "plan": plan,
    "convert": convert,
    "bench": bench,
    "cache": cache,
    "doctor": doctor,
}


def make_parser() -> flags.Parser:
    """The parser of the whole command line."""
    parser = flags.Parser(
        prog="jaxserve",
        usage="jaxserve COMMAND [options]",
        version=__version__,
        description="LLM inference in JAX. Without a model, commands use a tiny embedded one.",
        epilog="jaxserve COMMAND --help shows the flags of a command.",
    )
    parser.add_argument("--print-completion", action=PrintCompletion)
    flags.add_commands(parser, "jaxserve", COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 1 for errors, 2 for a wrong command line.

    Without ``argv`` it takes the process's words and the process for its own: unless ``USE_TORCH``
    says otherwise, tokenizers are loaded there without torch.
    """
    if argv is None:
        os.environ.setdefault("USE_TORCH", "0")
    words = flags.with_dashes(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    try:
        if hasattr(COMMANDS.get(name), "arrange"):
            words = [name, *COMMANDS[name].arrange(words[1:], os.environ)]
        args = make_parser().parse_args(words)
        name = args.command
        return COMMANDS[name].run(args[name])
    except JaxserveError as error:
        print(f"jaxserve {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, flags.UsageError) else 1
    except BrokenPipeError:
        # Whoever read our output has gone; nothing may complain about that at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
