"""Rows and the numbers of those that hold one."""

from __future__ import annotations

import pytest

from jaxserve.engine.request import Request
from jaxserve.engine.running import Running
from jaxserve.sampling.params import SamplingParams


def running_with(*prompt_lens: int, max_rows: int = 4) -> tuple[Running, list[Request]]:
    running = Running(max_rows)
    requests = [
        Request(str(index), [0] * length, SamplingParams(), max_tokens=10)
        for index, length in enumerate(prompt_lens)
    ]
    for request in requests:
        running.add(request, num_computed_tokens=0)
    return running, requests


def test_numbers_stay_with_their_requests_when_one_goes() -> None:
    running, (first, second, third) = running_with(5, 6, 7)
    running.columns.num_computed_tokens[:] = [1, 2, 3]
    running.remove(second)
    assert running.requests == [first, third]
    assert running.columns.num_prompt_tokens.tolist() == [5, 7]
    assert running.columns.num_computed_tokens.tolist() == [1, 3]
    assert running.columns.row.tolist() == [0, 2]
    running.check_integrity()


def test_the_lowest_free_row_is_given_out_first() -> None:
    running, (first, second, _) = running_with(5, 6, 7)
    running.remove(second)
    running.remove(first)
    assert (running.num_free_rows, first.row) == (3, -1)
    again = Request("again", [0] * 9, SamplingParams(), max_tokens=1)
    running.add(again, num_computed_tokens=4)
    assert again.row == 0
    assert running.columns.row.tolist() == [2, 0]
    assert running.columns.num_computed_tokens.tolist() == [0, 4]


def test_who_goes_takes_along_how_many_tokens_are_under_way() -> None:
    running, (request,) = running_with(5)
    running.columns.num_tokens[0] += 2
    request.token_ids.append(1)
    assert running.remove(request) == 1


def test_the_last_token_of_all_is_never_computed() -> None:
    running, _ = running_with(5)
    columns = running.columns
    assert columns.num_schedulable_tokens().tolist() == [5]
    columns.num_computed_tokens[0], columns.num_tokens[0] = 13, 14
    assert columns.num_schedulable_tokens().tolist() == [1]
    columns.num_computed_tokens[0], columns.num_tokens[0] = 14, 15
    assert columns.num_schedulable_tokens().tolist() == [0]


def test_check_integrity_notices_a_row_that_is_owned_twice() -> None:
    running, (first, second) = running_with(5, 6)
    second.row = first.row
    with pytest.raises(RuntimeError, match="rows are lost or owned twice"):
        running.check_integrity()
