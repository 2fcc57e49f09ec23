"""How long a call takes: inside a program, where calls follow each other, and alone.

Inside: two programs with different numbers of calls, whose difference in time is the calls' own, so
that what starting a program costs falls out. Alone: one jitted call, with what it costs the host.
Cold: calls rotate among copies of the inputs that are larger together than ``COLD_BYTES``, so that
the cache holds nothing that they need. Warm: every call reads the same inputs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lab.gates import copied
from pallas_kernels.lab.ops import Arguments, Candidate, Op, split_static

COLD_BYTES = 5 * 60e6
"""Five times the largest cache of the GPUs we know (60 MB, H200)."""
MAX_SETS = 48
"""Copies of inputs at most. Inputs too small to fill COLD_BYTES so are not timed cold."""
FEW, MOST = 2, 130
"""Calls in the shorter program, and most in the longer one."""
SPAN = 4e-3
"""Seconds by which the longer program should take longer: clocks and launches jitter by 10 µs."""
KERNELS = re.compile(r"= .*? (?:fusion|custom-call|dot|while|scatter|sort|reduce|copy)\(")
"""Instructions of an HLO module that start a kernel, or several."""
INSIDE = re.compile("fus|wrapped|region|while|reduc")
"""In the names of computations that run inside one instruction."""


Split = tuple[list[Arguments], list[Arguments], list[Arguments]]


@dataclass(frozen=True)
class Times:
    """Seconds a call, over repetitions."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """The statistics of samples."""
        p10, median, p90 = np.percentile(samples, (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


class TimingError(Exception):
    """A measurement doesn't mean what it should."""


class Inputs:
    """Sets of an op's arguments for one case, with equal content in memory of their own."""

    def __init__(self, op: Op, case: Any, seed: int) -> None:
        self.op = op
        self.arguments = op.make(case, seed)
        arrays, self.static = split_static(self.arguments)
        self.bytes = op.cost(case).bytes
        sets = min(MAX_SETS, max(2, int(COLD_BYTES / max(self.bytes, 1)) + 1))
        self.sets = [arrays, *(copied(arrays) for _ in range(sets - 1))]

    def warm(self) -> Inputs:
        """The first set only."""
        one = copy.copy(self)
        one.sets = self.sets[:1]
        return one

    @property
    def cold(self) -> bool:
        """Whether the sets together are too large for the cache."""
        return len(self.sets) * self.bytes > COLD_BYTES

    def split(self, calls: int) -> Split:
        """(carried arguments of each set, which are given away; the other arguments of each set;
        fresh arguments of each call). The first and the last are made anew each time."""
        op = self.op
        carried = [copied({name: one[name] for name in op.carried}) for one in self.sets]
        left_out = {*op.carried, *op.fresh}
        kept = [{name: a for name, a in one.items() if name not in left_out} for one in self.sets]
        first = {name: self.sets[0][name] for name in op.fresh}
        return carried, kept, [copied(first) for _ in range(calls)]

    def shapes(self, calls: int) -> Split:
        """What ``split`` gives, as shapes."""
        return jax.eval_shape(lambda: self.split(calls))


class InGraph:
    """The programs of one candidate over some inputs, and the clock over them.

    A call takes over the buffers that an earlier call with its set has written (``op.carried``), or
    has inputs of its own (``op.fresh``), and waits for the call before it: so XLA can neither merge
    calls nor drop or reorder them, and copies nothing.

    Attributes:
        kernels: started per call, copies included, once compiled; a loop counts as one.
    """

    def __init__(self, candidate: Candidate, inputs: Inputs, calls: int, interpret: bool) -> None:
        self._inputs, self._counts = inputs, (FEW, FEW + calls)
        self._function = functools.partial(candidate.bind(interpret), **inputs.static)
        self.kernels = 0.0
        self._programs: list[Any] = []
        self._data: Split | None = None

    def compile(self) -> None:
        """Compiles both programs; safe in a thread.

        Raises:
            TimingError: XLA has merged or dropped calls.
            Exception: whatever the candidate or its compiler raises.
        """
        programs, shapes = [], self._inputs.shapes(self._counts[1])
        for count in self._counts:
            jitted = jax.jit(
                functools.partial(self._run, count), donate_argnums=0, keep_unused=True
            )
            programs.append(jitted.lower(*shapes).compile())
        few, many = (count_kernels(program.as_text() or "") for program in programs)
        calls = self._counts[1] - self._counts[0]
        if many - few < calls:
            raise TimingError(f"{calls} more calls are only {many - few} more kernels: XLA cheats")
        self.kernels, self._programs = (many - few) / calls, programs

    def _run(
        self,
        count: int,
        carried: list[Arguments],
        kept: list[Arguments],
        fresh: list[Arguments],
    ) -> Any:
        op, last, rest = self._inputs.op, None, []
        carried = [dict(one) for one in carried]
        for call in range(count):
            index = call % len(carried)
            arguments = carried[index] | kept[index] | fresh[call]
            arguments, last = jax.lax.optimization_barrier((arguments, last))
            last = jax.tree.leaves(self._function(**arguments))
            carried[index] = {name: last[output] for name, output in op.carried.items()}
            rest += [out for i, out in enumerate(last) if i not in op.carried.values()]
        return carried, rest

    def sample(self) -> float:
        """Seconds a call, from one run of each program."""
        if self._data is None:
            self._data = jax.block_until_ready(self._inputs.split(self._counts[1]))
        carried, kept, fresh = self._data
        seconds = []
        for program in self._programs:
            start = time.perf_counter()
            carried, _ = jax.block_until_ready(program(carried, kept, fresh))
            seconds.append(time.perf_counter() - start)
        self._data = carried, kept, fresh
        return (seconds[1] - seconds[0]) / (self._counts[1] - self._counts[0])

    def measure(self, repeats: int) -> Times:
        """The statistics of so many samples, after two that don't count."""
        samples = [self.sample() for _ in range(repeats + 2)][2:]
        self._data = None
        return Times.of(samples)


def count_kernels(module: str) -> int:
    """Instructions of an HLO module that start kernels; a loop counts as one."""
    computations = (text.lstrip() for text in module.split("\n\n"))
    return sum(
        len(KERNELS.findall(text))
        for text in computations
        if not INSIDE.search(text.partition("\n")[0].partition("(")[0])
    )


def jitted(candidate: Candidate, inputs: Inputs, interpret: bool) -> Callable[..., Any]:
    """A call as a function of (carried arguments, the other arrays)."""
    function = functools.partial(candidate.bind(interpret), **inputs.static)
    return jax.jit(lambda carried, rest: function(**carried, **rest), donate_argnums=0)


def alone(run: Callable[..., Any], inputs: Inputs, repeats: int) -> Times:
    """One ``jitted`` call at a time, waited for: what it takes with everything the host does."""
    op = inputs.op
    carried, kept, fresh = inputs.split(1)
    samples = []
    for index in itertools.islice(itertools.cycle(range(len(carried))), repeats + 3):
        rest = kept[index] | fresh[0]
        start = time.perf_counter()
        outputs = jax.block_until_ready(run(carried[index], rest))
        samples.append(time.perf_counter() - start)
        leaves = jax.tree.leaves(outputs)
        carried[index] = {name: leaves[output] for name, output in op.carried.items()}
    return Times.of(samples[3:])


def calls_for(seconds: float) -> int:
    """How many more calls the longer program should have, if a call takes about so long."""
    return int(np.clip(SPAN / max(seconds, 1e-9), 6, MOST - FEW))


def slope(run: Callable[..., Any], x: jax.Array, *fixed: jax.Array, repeats: int = 10) -> float:
    """Seconds that ``run(x, *fixed)``, which returns an array like x, takes inside a program, at
    best."""

    def chain(count: int, x: jax.Array, *fixed: jax.Array) -> jax.Array:
        for _ in range(count):
            x = jax.lax.optimization_barrier(run(x, *fixed))
        return x

    few, many = (
        jax.jit(functools.partial(chain, count), donate_argnums=0).lower(x, *fixed).compile()
        for count in (2, 10)
    )
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(few(x, *fixed))
        middle = time.perf_counter()
        x = jax.block_until_ready(many(x, *fixed))
        seconds.append((middle - start, time.perf_counter() - middle))
    shortest = np.min(seconds, 0)
    return float(shortest[1] - shortest[0]) / 8


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in this run: bytes/s of a copy (read and write
    counted) and of reading alone, FLOP/s of a large bfloat16 matrix product."""

    copy: float
    read: float
    matmul: float

    @property
    def bandwidth(self) -> float:
        """The better of the two, bytes/s."""
        return max(self.copy, self.read)

    @classmethod
    def measure(cls) -> Ceilings:
        """Measures them; about two seconds on a GPU."""
        large = jax.default_backend() != "cpu"
        key = jax.random.key(0)
        words, side = (2**30, 8192) if large else (2**24, 512)
        x = jax.random.normal(key, (words // 8192, 8192), jnp.bfloat16)
        copy = 2 * x.nbytes / slope(lambda x: -x, x + 0)
        read = x.nbytes / min(
            slope(functools.partial(_sum, 1), jnp.zeros(x.shape[:1]), x),
            slope(functools.partial(_sum, None), jnp.zeros(()), x),
        )
        a = jax.random.normal(key, (side, side), jnp.bfloat16)
        b = a * side**-0.5
        return cls(copy, read, 2 * side**3 / slope(jnp.matmul, a + 0, b))


def _sum(axis: int | None, last: jax.Array, x: jax.Array) -> jax.Array:
    """x's sum, which depends on the last one, though far too little to change it."""
    return (x.astype(jnp.float32) + 1e-30 * jnp.ravel(last)[0]).sum(axis)
