"""The works by which engines are compared: fixed lengths, random ids, greedy, 256 rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.bench import measure
from jaxserve.bench.floors import Costs, Hardware, floor_seconds
from jaxserve.bench.results import Result
from jaxserve.bench.workload import random_items
from jaxserve.llm import LLM

Lengths = list[tuple[int, int]]
SETTINGS: dict[str, Any] = {
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "gpu_memory_utilization": 0.85,
    "enable_prefix_caching": False,
}
"""Of every engine that is compared."""
ROUNDS = 2


@dataclass(frozen=True)
class Work:
    """One work.

    Attributes:
        name: of it.
        lengths: (input, output) of each request; ``scale`` shrinks it for slow machines.
        unit: of its result.
        better: "lower" or "higher".
        value: the result, from the lengths and the seconds that they took.
    """

    name: str
    lengths: Callable[[float], Lengths]
    unit: str
    better: str
    value: Callable[[Lengths, float], float]


def _mixed(scale: float) -> Lengths:
    """Log-normal lengths, medians of 110 in and 148 out."""
    rng, lengths = random.Random(1), []
    for _ in range(_scaled(1000, scale)):
        input_len = min(2000, max(4, int(rng.lognormvariate(4.7, 1.1))))
        lengths.append((input_len, min(800, max(4, int(rng.lognormvariate(5.0, 0.8))))))
    return lengths


def _scaled(number: int, scale: float) -> int:
    return max(1, int(number * scale))


def _ms_per_token(lengths: Lengths, seconds: float) -> float:
    return seconds / max(o for _, o in lengths) * 1e3


def _output_rate(lengths: Lengths, seconds: float) -> float:
    return sum(o for _, o in lengths) / seconds


def _total_rate(lengths: Lengths, seconds: float) -> float:
    return sum(i + o for i, o in lengths) / seconds


def _seconds(_: Lengths, seconds: float) -> float:
    return seconds


WORKS = {
    work.name: work
    for work in (
        Work("latency", lambda s: [(128, _scaled(256, s))], "ms/token", "lower", _ms_per_token),
        Work("batch64", lambda s: [(128, _scaled(256, s))] * 64, "tok/s", "higher", _output_rate),
        Work(
            "throughput",
            lambda s: [(512, _scaled(256, s))] * _scaled(512, s),
            *("s", "lower", _seconds),
        ),
        Work("prefill", lambda s: [(2048, 1)] * _scaled(64, s), "tok/s", "higher", _total_rate),
        Work("mixed", _mixed, "s", "lower", _seconds),
    )
}


def run(
    llm: LLM,
    name: str,
    model: str,
    cost: Costs,
    hardware: Hardware | None,
    scale: float,
    peers: dict[str, float],
) -> Result:
    """One work on an engine: an eighth of it to warm up, then the best of two rounds.

    Args:
        llm: the engine.
        name: of WORKS.
        model: its name in the result.
        cost: of the model's tokens.
        hardware: what the floor is computed from; without it there is none.
        scale: of the lengths and counts; 1 is what is published.
        peers: other engines' numbers, for the result.
    """
    work = WORKS[name]
    lengths = work.lengths(scale)
    rng = random.Random(0)
    measure.seconds(llm, random_items(lengths[: max(1, len(lengths) // 8)], cost.vocab_size, rng))
    best = min(_round(llm, lengths, cost.vocab_size, rng) for _ in range(ROUNDS))
    floor = None
    if hardware is not None:
        rows = llm.config.max_num_seqs
        floor = work.value(lengths, floor_seconds(cost, lengths, rows, hardware))
    source = f"jaxserve bench works --works {name}"
    value = work.value(lengths, best)
    return Result(model, name, work.unit, work.better, value, floor, peers, source)


def _round(llm: LLM, lengths: Sequence[tuple[int, int]], vocab: int, rng: random.Random) -> float:
    return measure.seconds(llm, random_items(lengths, vocab, rng))
