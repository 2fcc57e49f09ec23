"""What requests gather about their prompts, step by step, whatever is computed twice."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.engine.request import Pooling, PromptRead, Request, TokenLogprobs
from jaxserve.sampling.params import SamplingParams

ENTRIES = [TokenLogprobs(token, -1.0 * token, 1, ()) for token in range(9)]


def request_of(pooling: Pooling | None = None, prompt_logprobs: int | None = None) -> Request:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Request("a", list(range(10)), params, max_tokens=1, pooling=pooling)


def read(start: int, end: int) -> PromptRead:
    return PromptRead(start, ENTRIES[start:end])


@pytest.mark.parametrize(
    "reads",
    [
        [(0, 9)],
        [(0, 4), (4, 9)],
        [(0, 4), (0, 2), (2, 9)],  # preempted in between, and begun anew
        [(0, 4), (0, 4), (4, 9)],
        [(0, 4), (4, 9), (0, 5)],  # begun anew, though the end was under way
        [(0, 9), (0, 3)],
    ],
    ids=str,
)
def test_logprobs_are_complete_however_often_a_prompt_is_begun(
    reads: list[tuple[int, int]],
) -> None:
    request = request_of(prompt_logprobs=1)
    assert request.reads_prompt
    for start, end in reads:
        request.take(read(start, end))
    assert request.prompt_logprobs == ENTRIES
    assert not request.reads_prompt


def test_a_mean_begins_anew_with_the_prompt() -> None:
    request = request_of("mean")
    for start, value in [(0, 1.0), (4, 2.0), (0, 3.0), (5, 4.0)]:
        request.take(PromptRead(start, pooled=np.array([value, 0.0], np.float32)))
    assert request.pooled.tolist() == [7.0, 0.0]
    assert request.embedding.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("pooling", "prompt_logprobs", "some", "whole"),
    [
        (None, None, False, False),
        (None, 0, True, True),
        ("last", None, True, False),
        ("mean", None, True, True),
    ],
)
def test_who_reads_the_prompt_and_who_needs_all_of_it(
    pooling: Pooling | None, prompt_logprobs: int | None, some: bool, whole: bool
) -> None:
    request = request_of(pooling, prompt_logprobs)
    assert (request.reads_prompt, request.reads_whole_prompt) == (some, whole)


def test_a_vector_of_zeros_stays_one() -> None:
    request = request_of("last")
    request.take(PromptRead(0, pooled=np.zeros(3, np.float32)))
    assert request.embedding.tolist() == [0, 0, 0]
