"""Where the time of a decode step goes: the device's kernels, one by one."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxserve.bench import measure
from jaxserve.bench.workload import random_items
from jaxserve.llm import LLM

SHORT, LONG = 8, 32
"""Output lengths of two traced runs: their difference holds decode steps alone."""
TIMED_STEPS = 100
LINES = ("Stream", "XLA Ops")
"""Lines of a device's trace that hold its kernels, on GPUs and on TPUs."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step.

    Attributes:
        name: as the compiler calls it.
        count: how often it runs in a step.
        microseconds: of one run.
    """

    name: str
    count: float
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """A decode step.

    Attributes:
        rows: requests in it.
        step_ms: its time without the profiler, steady state.
        kernels: what the device does in it, the longest first; empty where the platform's
            profiler tells nothing, as on a CPU.
    """

    rows: int
    step_ms: float
    kernels: list[Kernel]

    @property
    def busy_ms(self) -> float:
        """Time in kernels. The rest of the step are gaps, or a device that waits for the host."""
        return sum(kernel.count * kernel.microseconds for kernel in self.kernels) / 1e3


def profile(llm: LLM, rows: int, input_len: int) -> Profile:
    """Profiles the decoding of ``rows`` requests with ``input_len`` tokens of context and a few.

    The profiler switches CUDA graphs off, so the step's own time is measured apart.
    """
    _generate(llm, rows, input_len, SHORT)
    first = _generate(llm, rows, input_len, SHORT)
    step_ms = (_generate(llm, rows, input_len, SHORT + TIMED_STEPS) - first) / TIMED_STEPS * 1e3
    short, long = (_traced(llm, rows, input_len, length) for length in (SHORT, LONG))
    kernels = []
    for name, (count, total) in long.items():
        before = short.get(name, (0, 0.0))
        per_step = (count - before[0]) / (LONG - SHORT)
        if per_step > 0.1:
            each = (total - before[1]) / (count - before[0])
            kernels.append(Kernel(name, round(per_step, 2), each))
    kernels.sort(key=lambda kernel: -kernel.count * kernel.microseconds)
    return Profile(rows, step_ms, kernels)


def _generate(llm: LLM, rows: int, input_len: int, output_len: int) -> float:
    """Seconds that it takes."""
    lengths = [(input_len, output_len)] * rows
    items = random_items(lengths, llm.model_config.vocab_size, random.Random(rows))
    return measure.seconds(llm, items)


def _traced(llm: LLM, rows: int, input_len: int, output_len: int) -> dict[str, tuple[int, float]]:
    """(runs, total microseconds) of each kernel."""
    found: dict[str, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder:
        with jax.profiler.trace(folder):
            _generate(llm, rows, input_len, output_len)
        for file in Path(folder).rglob("*.xplane.pb"):
            for name, microseconds in _events(file):
                count, total = found.get(name, (0, 0.0))
                found[name] = count + 1, total + microseconds
    return found


def _events(file: Path) -> Iterator[tuple[str, float]]:
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith(("/device:GPU:0", "/device:TPU:0")):
            continue
        for line in plane.lines:
            if line.name.startswith(LINES):
                yield from ((event.name, event.duration_ns / 1e3) for event in line.events)
