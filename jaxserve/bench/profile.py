"""Where the time of a decode step or of a whole work goes: the device's kernels, one by one."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxserve.bench import measure
from jaxserve.bench.workload import Item, random_items
from jaxserve.bench.works import WORKS
from jaxserve.llm import LLM

SHORT, LONG = 8, 32
"""Output lengths of two traced runs: their difference holds decode steps alone."""
TIMED_STEPS = 100
LINES = ("Stream", "XLA Ops")
"""Lines of a device's trace that hold its kernels, on GPUs and on TPUs."""


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: as the compiler calls it.
        count: how often it runs, in a step or in a work.
        microseconds: of one run.
    """

    name: str
    count: float
    microseconds: float

    @property
    def total(self) -> float:
        """Microseconds of all runs."""
        return self.count * self.microseconds


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
        return sum(kernel.total for kernel in self.kernels) / 1e3


@dataclass(frozen=True)
class WorkProfile:
    """A whole work, prompts included.

    Attributes:
        work: its name.
        seconds: it takes without the profiler.
        steps: that the engine made for it.
        padding_waste: share of the computed token places that held no token.
        kernels: as in ``Profile``, with their runs in the whole work.
    """

    work: str
    seconds: float
    steps: int
    padding_waste: float
    kernels: list[Kernel]

    @property
    def busy_seconds(self) -> float:
        """Time in kernels."""
        return sum(kernel.total for kernel in self.kernels) / 1e6


def profile(llm: LLM, rows: int, input_len: int) -> Profile:
    """Profiles the decoding of ``rows`` requests with ``input_len`` tokens of context and a few.

    The profiler switches CUDA graphs off, so the step's own time is measured apart.
    """

    def items(output_len: int) -> list[Item]:
        return _items(llm, [(input_len, output_len)] * rows, seed=rows)

    measure.seconds(llm, items(SHORT))
    first = measure.seconds(llm, items(SHORT))
    step_ms = (measure.seconds(llm, items(SHORT + TIMED_STEPS)) - first) / TIMED_STEPS * 1e3
    short, long = (_traced(llm, items(length)) for length in (SHORT, LONG))
    kernels = []
    for name, (count, total) in long.items():
        before = short.get(name, (0, 0.0))
        per_step = (count - before[0]) / (LONG - SHORT)
        if per_step > 0.1:
            each = (total - before[1]) / (count - before[0])
            kernels.append(Kernel(name, round(per_step, 2), each))
    return Profile(rows, step_ms, sorted(kernels, key=lambda kernel: -kernel.total))


def profile_work(llm: LLM, name: str, scale: float = 1.0) -> WorkProfile:
    """Profiles a work of ``works.WORKS``, made smaller by ``scale`` <= 1."""
    lengths = WORKS[name].lengths(scale)
    before = dataclasses.replace(llm.stats)
    measure.seconds(llm, _items(llm, lengths, seed=0))  # to warm up; its steps are counted
    steps = llm.stats.steps - before.steps
    padded = llm.stats.padded_tokens - before.padded_tokens
    scheduled = llm.stats.scheduled_tokens - before.scheduled_tokens
    seconds = measure.seconds(llm, _items(llm, lengths, seed=1))
    traced = _traced(llm, _items(llm, lengths, seed=2))
    kernels = [Kernel(name, count, total / count) for name, (count, total) in traced.items()]
    kernels.sort(key=lambda kernel: -kernel.total)
    return WorkProfile(name, seconds, steps, 1 - scheduled / padded, kernels)


def _items(llm: LLM, lengths: Sequence[tuple[int, int]], seed: int) -> list[Item]:
    return random_items(lengths, llm.model_config.vocab_size, random.Random(seed))


def _traced(llm: LLM, items: Sequence[Item]) -> dict[str, tuple[int, float]]:
    """(runs, total microseconds) of each kernel."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    found: dict[str, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            measure.seconds(llm, items)
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
