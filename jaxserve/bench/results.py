"""The file that holds measured results beside the peers' and the floor, and its table.

    {
      "machine": "one NVIDIA H200, JAX 0.11.2, bfloat16, random weights",
      "date": "2026-11-21",
      "results": [
        {"model": "llama8b", "work": "latency", "unit": "ms/token", "better": "lower",
         "ours": 4.5, "peers": {"vLLM": 4.96, "SGLang": 4.82}, "floor": 4.1,
         "source": "jaxserve bench works --model-shape llama8b"}
      ]
    }

"floor", "peers" and "source" may be missing; what was not measured is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        model: name of the model or shape.
        work: what was done.
        unit: of all numbers here.
        better: "lower" or "higher".
        ours: jaxserve's.
        floor: what the hardware allows at best; None where there is no such bound.
        peers: other engines' numbers by name.
        source: the command or file that the numbers come from.
    """

    model: str
    work: str
    unit: str
    better: str
    ours: float
    floor: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "work", "unit", "source"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a text.")
        if self.better not in ("lower", "higher"):
            raise ConfigError(f'better={self.better!r} must be "lower" or "higher".')
        if not isinstance(self.peers, dict):
            raise ConfigError(f"peers={self.peers!r} must map names to numbers.")
        numbers = {"ours": self.ours, **self.peers}
        if self.floor is not None:
            numbers["floor"] = self.floor
        for name, value in numbers.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value <= 0:
                raise ConfigError(f"{self.work}: {name}={value!r} must be a positive number.")

    @property
    def share(self) -> float | None:
        """Share of the floor's speed that we reach, 1 at best; None without a floor."""
        if self.floor is None:
            return None
        return self.floor / self.ours if self.better == "lower" else self.ours / self.floor

    @property
    def lead(self) -> float | None:
        """How many times as fast as the fastest peer we are; None without peers."""
        if not self.peers:
            return None
        if self.better == "lower":
            return min(self.peers.values()) / self.ours
        return self.ours / max(self.peers.values())


@dataclass(frozen=True)
class Results:
    """A file of results; ``machine`` and ``date`` say where and when they were measured."""

    results: tuple[Result, ...]
    machine: str = ""
    date: str = ""

    def peers_of(self, model: str, work: str) -> dict[str, float]:
        """The peers' numbers for a work; empty if there are none."""
        for result in self.results:
            if (result.model, result.work) == (model, work):
                return result.peers
        return {}

    def save(self, path: str | Path) -> None:
        """Writes what ``load`` reads."""
        plain = dataclasses.asdict(self)
        Path(path).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Reads a file.

        Raises:
            ConfigError: there is no such file, or it isn't of this format.
        """
        plain = read_json(path)
        try:
            entries = tuple(Result(**entry) for entry in plain["results"])
            return cls(entries, str(plain.get("machine", "")), str(plain.get("date", "")))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of results: {error}.") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: it can't be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}.") from error


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first the head, as aligned text; the first column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def result_table(results: Sequence[Result]) -> str:
    """Results beside the peers and the floor."""
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    rows = [["work", "model", "unit", "jaxserve", *peers, "floor", "share"]]
    for result in results:
        others = [result.peers.get(name) for name in peers]
        numbers = [number(value) for value in (result.ours, *others, result.floor)]
        share = "" if result.share is None else f"{result.share:.0%}"
        rows.append([result.work, result.model, result.unit, *numbers, share])
    return table(rows)


def number(value: float | None) -> str:
    """A number with four digits or more; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
