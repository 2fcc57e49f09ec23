"""Finds stop strings in text that arrives in pieces. No JAX."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one text for the stop string that is complete first; of several, the longest.

    How the text is cut into pieces makes no difference. Text is given out only when no stop string
    can still begin in it, so nothing that is given out is ever taken back.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Takes the next piece; returns what may be shown. Sets ``matched`` once a stop is found,
        after which all further text is dropped."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        hits = [(at, stop) for at, stop in found if at >= 0]
        if hits:
            at, self.matched = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: at + len(self.matched)] if self._include else text[:at]
        keep = self._held_back(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text still held back, when the end has come without a stop string."""
        text, self._held = self._held, ""
        return text

    def _held_back(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - size :]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
