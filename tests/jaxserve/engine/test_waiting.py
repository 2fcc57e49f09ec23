"""The queue: by priority, within one by arrival, whoever leaves or comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.request import Request
from jaxserve.engine.waiting import Waiting
from jaxserve.sampling.params import SamplingParams


def request_of(name: str, priority: int) -> Request:
    return Request(name, [1], SamplingParams(), max_tokens=1, priority=priority)


def names(waiting: Waiting) -> str:
    assert len(waiting) == len(list(waiting))
    return "".join(request.request_id for request in waiting)


def test_lower_priorities_come_first_and_equal_ones_in_order_of_arrival() -> None:
    waiting = Waiting()
    for name, priority in [("a", 0), ("b", 5), ("c", -3), ("d", 0), ("e", 5)]:
        waiting.add(request_of(name, priority))
    assert names(waiting) == "cadbe"


def test_who_is_put_back_comes_first_among_its_like() -> None:
    waiting, first, last = Waiting(), request_of("x", 0), request_of("y", 5)
    for name, priority in [("a", 0), ("b", 5), ("c", -3)]:
        waiting.add(request_of(name, priority))
    waiting.put_back(first)
    waiting.put_back(last)
    assert names(waiting) == "cxayb"


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans(), st.integers(0, 9)), max_size=30))
def test_any_sequence_of_arrivals_and_departures_keeps_the_order(steps: list) -> None:
    """Compared with a list that is sorted anew each time."""
    waiting, model = Waiting(), []
    for number, (priority, back, leaves) in enumerate(steps):
        request = request_of(f"{number},", priority)
        if back:
            waiting.put_back(request)
            model.insert(0, request)
        else:
            waiting.add(request)
            model.append(request)
        if leaves < len(model) and number % 2:
            waiting.remove(model.pop(leaves))
        assert list(waiting) == sorted(model, key=lambda request: request.priority)
    assert bool(waiting) == bool(model)
