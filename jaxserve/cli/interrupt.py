"""Ctrl-C while text is generated: stop between two tokens, where the engine is in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """The user pressed Ctrl-C."""


class Interrupt:
    """Remembers that Ctrl-C was pressed.

    Args:
        at_once: it also raises KeyboardInterrupt where the program is. That alone may get lost:
            Python drops what is raised in a finalizer or in a callback of its garbage collector.
    """

    def __init__(self, at_once: bool = False) -> None:
        self._pressed, self._at_once = False, at_once

    def check(self) -> None:
        """Raises Stopped if Ctrl-C was pressed. To be called after every token."""
        if self._pressed:
            raise Stopped

    def press(self, signum: int, frame: FrameType | None) -> None:
        """Handles the signal; the second one doesn't wait for a token."""
        before, self._pressed = self._pressed, True
        if before or self._at_once:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(at_once: bool = False) -> Iterator[Interrupt]:
    """While it lasts, Ctrl-C makes ``check`` raise Stopped; ``at_once`` as in Interrupt."""
    interrupt = Interrupt(at_once)
    before = signal.signal(signal.SIGINT, interrupt.press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
