"""The user's turns in a chat, from a keyboard or a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TextIO

FENCE = '"""'


def read_turns(source: TextIO, interactive: bool) -> Iterator[str]:
    """The user's turns: lines, joined where a backslash or quotation marks go on."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() editing and history)
    lines = _typed_lines() if interactive else (line.rstrip("\r\n") for line in source)
    for line in lines:
        parts = []
        while line.endswith("\\"):
            parts.append(line[:-1])
            line = next(lines, "")
        parts.append(line)
        text = "\n".join(parts)
        if text.lstrip().startswith(FENCE):
            text = text.lstrip().removeprefix(FENCE)
            while not text.rstrip().endswith(FENCE):
                more = next(lines, None)
                if more is None:
                    break
                text += "\n" + more
            text = text.rstrip().removesuffix(FENCE).strip("\n")
        yield text


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
