"""Ctrl-C while text is generated: stop between two tokens, where the engine is in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """The user pressed Ctrl-C."""


class Interrupt:
    """Remembers that Ctrl-C was pressed."""

    def __init__(self) -> None:
        self._pressed = False

    def check(self) -> None:
        """Raises Stopped if Ctrl-C was pressed. To be called after every token."""
        if self._pressed:
            raise Stopped

    def press(self, signum: int, frame: FrameType | None) -> None:
        """Handles the signal; the second one doesn't wait for a token."""
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """While it lasts, Ctrl-C makes ``check`` raise Stopped."""
    interrupt = Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
