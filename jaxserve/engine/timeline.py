"""When the stages of a start began and ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """One stage; ``start`` and ``end`` are seconds of ``time.perf_counter``."""

    name: str
    start: float
    end: float


@dataclass
class Timeline:
    """The stages so far; they may overlap.

    Attributes:
        spans: those that ended.
        on_begin: called with the name of each stage as it begins.
    """

    spans: list[Span] = field(default_factory=list)
    on_begin: Callable[[str], None] = lambda name: None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Enters what runs inside as a stage."""
        self.on_begin(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(name, start, time.perf_counter()))
