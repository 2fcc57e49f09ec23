"""``jaxserve --print-completion SHELL``: a script that completes commands and flags."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jsonargparse import ArgumentParser

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Prints the script and exits; eval it, or put it where the shell finds it."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        text = f"print a script that completes flags in {', '.join(SHELLS[:-1])} or {SHELLS[-1]}"
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            choices=SHELLS,
            metavar="SHELL",
            help=text,
        )

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        assert isinstance(parser, ArgumentParser)
        try:
            print(parser.get_completion_script(f"shtab-{values}"))
        except ValueError:
            parser.error("--print-completion needs shtab: pip install shtab")
        sys.exit(0)  # the parser can't be used any more, not even to exit
