"""Programs: compiled in the background or on demand, once; errors reach whoever asks."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine import programs as programs_module
from jaxserve.engine.programs import FAIR_INTERVAL, Lower, Programs, compile_events
from jaxserve.engine.stats import Stats
from jaxserve.errors import EngineClosedError


def lowering(add: int) -> Lower:
    """A small program that adds a number."""
    return lambda: jax.jit(lambda x: x + add).lower(jax.ShapeDtypeStruct((), jnp.int32))


def failing() -> Any:
    raise ValueError("too large")


class Gate:
    """A lowering whose compiling waits until it is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self) -> Any:
        return self

    def compile(self, options: dict[str, Any]) -> Any:
        self.entered.set()
        assert self.open.wait(30)
        return lowering(0)().compile(options)


def test_get_compiles_on_demand_and_once() -> None:
    stats = Stats()
    programs = Programs({index: lowering(index) for index in range(3)}, stats)
    assert not programs.ready(1)
    program = programs.get(1)
    assert programs.ready(1)
    assert program(jnp.int32(5)) == 6
    assert programs.get(1) is program
    assert stats.compilations == {"late": 1}


def test_who_waits_for_a_program_is_counted_while_it_is_compiled() -> None:
    stats, gate = Stats(), Gate()
    programs = Programs({0: gate, 1: lowering(1)}, stats, on_demand={2: failing})
    programs.get(1)
    thread = threading.Thread(target=programs.get, args=(0,))
    thread.start()
    assert gate.entered.wait(30)
    assert stats.waiting_for_programs == 1
    gate.open.set()
    thread.join(30)
    with pytest.raises(ValueError, match="too large"):
        programs.get(2)
    assert stats.waiting_for_programs == 0


def test_what_few_need_is_compiled_only_for_them() -> None:
    stats = Stats()
    programs = Programs({0: lowering(0)}, stats, on_demand={1: lowering(1), 2: failing})
    programs.start(threads=1)
    programs.wait()
    assert not programs.ready(1)
    assert stats.compilations == {"warmup": 1}
    program = programs.get(1)
    assert program(jnp.int32(5)) == 6
    assert programs.get(1) is program
    assert stats.compilations == {"warmup": 1, "late": 1}
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            programs.get(2)
    programs.close()
    with pytest.raises(EngineClosedError):
        programs.get(1)


def test_started_all_get_ready_in_the_given_order() -> None:
    stats, order = Stats(), []

    def noted(index: int) -> Lower:
        def lower() -> Any:
            order.append(index)
            return lowering(index)()

        return lower

    programs = Programs({index: noted(index) for index in (2, 0, 1)}, stats)
    programs.start(threads=1)
    seen: list[tuple[int, int]] = []
    programs.wait(lambda done, total: seen.append((done, total)))
    assert order == [2, 0, 1]
    assert seen[-1] == (3, 3)
    assert seen == sorted(set(seen))
    assert stats.compilations == {"warmup": 3}
    assert all(programs.get(index)(jnp.int32(1)) == index + 1 for index in range(3))
    assert programs.temp_bytes >= 0


def test_one_program_is_traced_at_a_time() -> None:
    tracing = threading.Lock()

    def alone() -> Any:
        assert tracing.acquire(blocking=False)
        time.sleep(0.01)  # long enough for another thread to come
        tracing.release()
        return lowering(0)()

    programs = Programs(dict.fromkeys(range(6), alone), Stats())
    programs.start(threads=3)
    assert programs.get(5)(jnp.int32(1)) == 1
    programs.wait()


def test_the_compiler_is_asked_for_what_was_given() -> None:
    options = {"no_such_option": 1}
    with pytest.raises(RuntimeError, match="no_such_option"):
        Programs({0: lowering(0)}, Stats(), options=options).get(0)


def test_get_does_not_wait_for_programs_that_are_compiled_before() -> None:
    gate = Gate()
    programs = Programs({"slow": gate, "other": lowering(1)}, Stats())
    programs.start(threads=1)
    assert gate.entered.wait(30)
    assert programs.get("other")(jnp.int32(1)) == 2
    assert not programs.ready("slow")
    gate.open.set()
    programs.wait()
    assert programs.ready("slow")


def test_get_waits_for_the_thread_that_compiles_it() -> None:
    gate, stats = Gate(), Stats()
    programs = Programs({"slow": gate}, stats)
    programs.start(threads=1)
    assert gate.entered.wait(30)
    threading.Timer(0.05, gate.open.set).start()
    assert programs.get("slow")(jnp.int32(1)) == 1
    assert stats.compilations == {"warmup": 1}


def test_errors_reach_get_every_time_and_the_others_go_on() -> None:
    stats = Stats()
    programs = Programs({"bad": failing, "good": lowering(1)}, stats)
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            programs.get("bad")
    assert programs.get("good")(jnp.int32(1)) == 2
    assert stats.compilations == {"late": 1}


def test_errors_of_the_background_reach_wait_and_get() -> None:
    programs = Programs({"good": lowering(1), "bad": failing}, Stats())
    programs.start(threads=2)
    with pytest.raises(ValueError, match="too large"):
        programs.wait()
    with pytest.raises(ValueError, match="too large"):
        programs.get("bad")


def test_close_drops_what_is_not_compiled_yet_and_waits_for_what_is() -> None:
    gate, stats = Gate(), Stats()
    programs = Programs({"slow": gate, "never": failing}, stats)
    programs.start(threads=1)
    assert gate.entered.wait(30)
    threading.Timer(0.05, gate.open.set).start()
    programs.close()
    assert stats.compilations == {"warmup": 1}
    assert not programs.ready("slow")
    programs.close()


def test_nobody_waits_for_a_program_that_close_dropped() -> None:
    gate = Gate()
    programs = Programs({"slow": gate, "never": lowering(1)}, Stats())
    programs.start(threads=1)
    assert gate.entered.wait(30)
    threading.Timer(0.05, gate.open.set).start()
    programs.close()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            programs.get("never")
        except BaseException as error:
            errors.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(5)
    assert not asking.is_alive()
    assert [type(error) for error in errors] == [EngineClosedError]


def test_compilations_of_the_process_are_counted() -> None:
    before = compile_events()["compilations"]
    jax.jit(lambda x: x * time.time())(jnp.zeros(17))
    assert compile_events()["compilations"] > before
    assert compile_events() is compile_events()


def test_what_is_urgent_is_started_first_and_the_rest_later() -> None:
    stats = Stats()
    programs = Programs({index: lowering(index) for index in range(4)}, stats)
    programs.start(keys=iter((2, 1, 2)))
    while not (programs.ready(1) and programs.ready(2)):
        time.sleep(0.001)
    assert programs.num_ready == 2
    programs.start()
    programs.wait()
    programs.start()
    assert stats.compilations == {"warmup": 4}


def test_threads_take_short_turns_while_anyone_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals, here = [0.005], threading.current_thread()

    def noted(seconds: float) -> None:
        if threading.current_thread() is here:  # engines of other tests may still compile
            intervals.append(seconds)

    own = SimpleNamespace(getswitchinterval=lambda: intervals[-1], setswitchinterval=noted)
    monkeypatch.setattr(programs_module, "sys", own)
    fair = programs_module._FairThreads()
    with fair, fair:
        assert intervals == [0.005, FAIR_INTERVAL]
    assert intervals == [0.005, FAIR_INTERVAL, 0.005]
