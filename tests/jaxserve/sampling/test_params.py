"""SamplingParams: every bad value is refused by the name of its field, every good one is kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.sampling.checks import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
)
from jaxserve.sampling.params import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

NAN, INF = math.nan, math.inf
NOT_INTEGERS = [1.0, "1", None, True, [1], NAN]
NOT_NUMBERS = [NAN, INF, -INF, "1", None, True, [1.0], 1j]

BAD: dict[str, list[Any]] = {
    "n": [0, -1, MAX_N + 1, *NOT_INTEGERS],
    "temperature": [-0.1, 2.1, *NOT_NUMBERS],
    "top_p": [0, -0.1, 1.1, *NOT_NUMBERS],
    "top_k": [-2, 2**31, *NOT_INTEGERS],
    "min_p": [-0.1, 1.1, *NOT_NUMBERS],
    "repetition_penalty": [0, -1, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "seed": [2**63, -(2**63) - 1, 1.0, "1", True],
    "stop": ["", [""], ["x", ""], [1], 1, {"x": 1}, b"x", "x" * (MAX_STOP_STRING_CHARS + 1)],
    "stop_token_ids": [[-1], [2**31], [1.0], [True], ["1"], 1, "12", {1}, [None]],
    "max_tokens": [0, -1, 2**31, 1.0, "1", True],
    "min_tokens": [-1, 17, 2**31, *NOT_INTEGERS],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0, "1", True],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, 1.0, "1", True],
    "logit_bias": [[1], "1", {-1: 1}, {2**31: 1}, {"a": 1}, {"-1": 1}, {True: 1}, {1.0: 1}],
    "allowed_token_ids": [[], [-1], [2**31], [1.0], [True], ["1"], 1, "12", {1}, [None]],
    "bad_words": ["", [""], ["x", " "], [1], 1, {"x": 1}, b"x", "x" * (MAX_BAD_WORD_CHARS + 1)],
    "bad_words_token_ids": [[[]], [1], ["1"], 1, "12", [[-1]], [[1.0]], [[True]], [None]],
    "truncate_prompt_tokens": [0, -2, 2**31, 1.0, "1", True],
}
BAD["logit_bias"] += [{1: value} for value in (100.1, -100.1, *NOT_NUMBERS)]
BAD["logit_bias"].append(dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1))
BAD["bad_words"].append(["x"] * (MAX_BAD_WORDS + 1))
BAD["bad_words_token_ids"] += [[[1] * (MAX_BAD_WORD_TOKENS + 1)], [[1]] * (2 * MAX_BAD_WORDS + 1)]
BAD["stop"].append(["x"] * (MAX_STOP_STRINGS + 1))
BAD["stop_token_ids"].append([1] * (MAX_STOP_TOKEN_IDS + 1))

GOOD: dict[str, list[Any]] = {
    "n": [1, MAX_N],
    "temperature": [0.01, 0.5, 1, 2],
    "top_p": [0.001, 1],
    "top_k": [0, 1, 2**31 - 1],
    "min_p": [0, 1],
    "repetition_penalty": [0.5, 3],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "seed": [None, 0, 2**63 - 1, -(2**63)],
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 16],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "logit_bias": [None, {0: -100.0}, dict.fromkeys(range(MAX_LOGIT_BIAS), 100.0)],
    "allowed_token_ids": [None, (0,), (5, 5, 2**31 - 1)],
    "bad_words": [("x",), ("x" * MAX_BAD_WORD_CHARS,) * MAX_BAD_WORDS],
    "bad_words_token_ids": [((1,) * MAX_BAD_WORD_TOKENS,) * 2 * MAX_BAD_WORDS],
    "truncate_prompt_tokens": [None, 1, -1],
}
FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={value!r:.20}")
        for name, values in table.items()
        for value in values
    ]


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_value_is_refused_by_the_name_of_its_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as error:
        SamplingParams(**{name: value})
    assert error.value.param == name
    assert len(str(error.value)) < 300, "a long value is not repeated in full"


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_values_up_to_the_limits_are_kept(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "presence_penalty"])
def test_an_integer_too_large_for_a_float_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        SamplingParams(**{name: 10**400})


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_is_no_bool_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{name: "false"})
    assert error.value.param == name


def test_every_field_has_cases() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == set(BAD) | set(FLAGS)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_integers_are_accepted_as_floats(name: str) -> None:
    assert type(getattr(SamplingParams(**{name: 1}), name)) is float


def test_the_defaults_change_nothing() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert not params.has_penalties
    assert not params.greedy
    assert params.stop == params.stop_token_ids == ()


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("repetition_penalty", 1, 1.1),
        ("presence_penalty", 0, -0.1),
        ("frequency_penalty", 0, 0.1),
    ],
)
def test_a_penalty_counts_unless_it_is_neutral(name: str, neutral: float, other: float) -> None:
    assert not SamplingParams(**{name: neutral}).has_penalties
    assert SamplingParams(**{name: other}).has_penalties


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-6])
def test_greedy_turns_the_truncations_off(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.1)
    assert params.greedy
    assert params == SamplingParams(temperature=0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


def test_greedy_completions_would_all_be_equal() -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(temperature=0, n=2)
    assert error.value.param == "n"


@pytest.mark.parametrize("temperature", [1e-5, 0.001, 0.01])
def test_a_tiny_temperature_is_raised_to_one_that_float32_can_bear(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).temperature == 0.01


def test_minus_one_means_off_or_none() -> None:
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens") as error:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert error.value.param == "min_tokens"
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


@pytest.mark.parametrize(
    ("stop", "kept"), [(None, ()), ("ab", ("ab",)), ([], ()), (["a", "b"], ("a", "b"))]
)
def test_stop_strings_become_a_tuple(stop: Any, kept: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop == kept


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize") as error:
        SamplingParams(stop="x", detokenize=False)
    assert error.value.param == "stop"


def test_the_lists_of_the_caller_are_copied() -> None:
    ids = [1, 2]
    params = SamplingParams(stop_token_ids=ids)
    ids.append(3)
    assert params.stop_token_ids == (1, 2)


def test_replace_makes_a_checked_copy() -> None:
    params = SamplingParams(seed=3, stop="x")
    changed = params.replace(top_k=5)
    assert (changed.top_k, changed.seed, changed.stop) == (5, 3, ("x",))
    assert params.top_k == 0
    with pytest.raises(InvalidRequestError):
        params.replace(top_p=2)


def test_params_are_frozen_keyword_only_and_hashable() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(beam_width=1)  # type: ignore[call-arg]
    assert hash(params) == hash(params.replace())


# --- edits of single logits -----------------------------------------------------------------------


@pytest.mark.parametrize("empty", [{"logit_bias": {}}, {"bad_words": []}, {"bad_words": None}])
def test_empty_edits_are_no_edits(empty: dict[str, Any]) -> None:
    params = SamplingParams(**empty)
    assert params == SamplingParams()
    assert not params.has_edits


@pytest.mark.parametrize(
    "edits",
    [{"logit_bias": {1: 0.0}}, {"allowed_token_ids": [1]}, {"bad_words_token_ids": [[1, 2]]}],
)
def test_edits_are_seen_and_can_be_hashed(edits: dict[str, Any]) -> None:
    params = SamplingParams(**edits)
    assert params.has_edits
    assert hash(params) == hash(params.replace(seed=None))


def test_biases_may_have_the_keys_of_json() -> None:
    assert SamplingParams(logit_bias={"17": 5}).logit_bias == {17: 5.0}


@pytest.mark.parametrize(("count", "kept"), [(None, 10), (1, 1), (10, 10), (99, 10), (-1, 7)])
def test_the_last_tokens_of_the_prompt_are_kept(count: int | None, kept: int) -> None:
    """-1 leaves room for one token of 8."""
    prompt = list(range(10))
    params = SamplingParams(truncate_prompt_tokens=count)
    assert params.truncated(prompt, max_model_len=8) == prompt[-kept:]
