"""One engine at several batch sizes or lengths: tokens per second against time per token."""

from __future__ import annotations

import csv
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench import measure
from jaxserve.bench.floors import Costs, Hardware, floor_seconds
from jaxserve.bench.results import read_json
from jaxserve.bench.workload import random_items
from jaxserve.errors import ConfigError
from jaxserve.llm import LLM

VARIED = ("batch_size", "input_len", "output_len")


@dataclass(frozen=True)
class Point:
    """One measured setting.

    Attributes:
        batch_size: requests given at once.
        input_len, output_len: of each, in tokens.
        seconds: that they took, the best round.
        tokens_per_second: generated.
        ms_per_token: the time of a request over its generated tokens, prompts included.
        floor_ms_per_token: what the hardware allows at best; None if it isn't known.
    """

    batch_size: int
    input_len: int
    output_len: int
    seconds: float
    tokens_per_second: float
    ms_per_token: float
    floor_ms_per_token: float | None = None


def run(
    llm: LLM,
    setting: dict[str, int],
    cost: Costs,
    hardware: Hardware | None,
    num_iters: int,
    seed: int,
) -> Point:
    """Measures one setting: one round to warm up, then the best of ``num_iters``.

    Args:
        llm: the engine.
        setting: a value for each name of VARIED.
        cost: of the model's tokens.
        hardware: what the floor is computed from; without it there is none.
        num_iters: rounds.
        seed: of the random prompts.
    """
    count, input_len, output_len = (setting[name] for name in VARIED)
    lengths = [(input_len, output_len)] * count
    items = random_items(lengths, cost.vocab_size, random.Random(seed))
    measure.seconds(llm, items)
    best = min(measure.seconds(llm, items) for _ in range(num_iters))
    least = None
    if hardware is not None:
        rows = llm.config.max_num_seqs
        least = floor_seconds(cost, lengths, rows, hardware) / output_len * 1e3
    rate, ms = count * output_len / best, best / output_len * 1e3
    return Point(count, input_len, output_len, best, rate, ms, least)


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """The points as a table for spreadsheets."""
    names = [field.name for field in dataclasses.fields(Point)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(point) for point in points)


Curve = list[tuple[float, float]]


def read_peers(path: str) -> dict[str, Curve]:
    """Other engines' curves: {name: [{"ms_per_token": x, "tokens_per_second": y}, ...]}.

    A file that a sweep of ours wrote has the same entries under "points".

    Returns:
        (ms per token, tokens per second) pairs by name.

    Raises:
        ConfigError: the file isn't of this format.
    """
    plain = read_json(path)
    try:
        return {str(name): [_pair(entry) for entry in entries] for name, entries in plain.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no file of peers' curves: {error!r}.") from error


def _pair(entry: dict[str, Any]) -> tuple[float, float]:
    return float(entry["ms_per_token"]), float(entry["tokens_per_second"])
