"""A runner that fails where a test tells it to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxserve.engine.core import Engine, Runner
from jaxserve.engine.decision import Decision, StepResult
from jaxserve.engine.stats import Stats

Fault = Literal["dispatch", "collect", "nan", "hang", "slow", "compile"]
"""What goes wrong: starting a step raises; waiting for it raises; all its logits are NaN; waiting
for it never ends, or takes a while; starting it takes COMPILE_S, for a program is missing."""
COMPILE_S = 3.0


class DeviceFailure(Exception):
    """What a device error looks like to the engine."""


class FaultyRunner:
    """Stands before a runner.

    Args:
        runner: does the work.
        fault_of: what goes wrong in step k, if anything; steps count from 0, failed ones too.
        stats: of the engine, for what a runner notes there.
        on_failure: called just before an error is raised.
    """

    def __init__(
        self,
        runner: Runner,
        fault_of: Callable[[int], Fault | None],
        stats: Stats,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._stats = stats
        self._fault_of = fault_of
        self._on_failure = on_failure
        self.num_steps = 0
        self.num_failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch(self, decision: Decision) -> Any:
        fault = self._fault_of(self.num_steps)
        self.num_steps += 1
        if fault == "dispatch":
            self._fail("the step could not be started")
        if fault == "compile":
            self._stats.waiting_for_programs += 1
            time.sleep(COMPILE_S)
            self._stats.waiting_for_programs -= 1
        return fault, decision.num_lanes, self._runner.dispatch(decision)

    def collect(self, handle: Any) -> StepResult:
        fault, num_lanes, inner = handle
        if fault == "collect":
            self._fail("the step failed on the device")
        if fault == "hang":
            time.sleep(3600)
        if fault == "slow":
            time.sleep(0.02)
        result = self._runner.collect(inner)
        return StepResult([-1] * num_lanes) if fault == "nan" else result

    def allocate(self) -> None:
        self._runner.allocate()

    def close(self) -> None:
        self._runner.close()

    def _fail(self, message: str) -> None:
        self._on_failure()
        self.num_failures += 1
        raise DeviceFailure(message)


def inject(
    engine: Engine,
    faults: Mapping[int, Fault] | Callable[[int], Fault | None],
    on_failure: Callable[[], None] = lambda: None,
) -> FaultyRunner:
    """Puts a faulty runner before an engine's own; ``faults`` maps steps to what goes wrong."""
    assert engine._runner is not None
    fault_of = faults if callable(faults) else faults.get
    runner = FaultyRunner(engine._runner, fault_of, engine.stats, on_failure)
    engine._runner = runner
    return runner
