"""Biases, allowed tokens and bad words, against plain Python; and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling import edits
from jaxserve.sampling.checks import MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIAS
from jaxserve.sampling.params import SamplingParams
from jaxserve.sampling.sample import BAD_ROW, Sampled, SamplerState
from tests.jaxserve.sampling.test_sample import SAMPLE, empty_state
from tests.jaxserve.sampling.test_stages import inputs_of, logits_of, softmax

VOCAB = 61


def edited_logits(logits: np.ndarray, params: SamplingParams, output: Sequence[int]) -> np.ndarray:
    """One lane's logits [vocab] as vLLM's rules say."""
    edited = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        ruled_out = sorted(set(range(len(logits))) - set(params.allowed_token_ids))
        edited[ruled_out] = -np.inf
    for *before, last in params.bad_words_token_ids:
        if list(output)[len(output) - len(before) :] == before:
            edited[last] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        edited[token] += bias
    return edited


def state_with(
    asked: Sequence[SamplingParams], outputs: Sequence[Sequence[int]], vocab: int = VOCAB
) -> SamplerState:
    """A row for each request, with its edits entered."""
    state = empty_state(len(asked), vocab)
    lines = [edits.line(params, output, vocab) for params, output in zip(asked, outputs)]
    return SamplerState(state.last_token, state.counts, jnp.asarray(np.stack(lines)))


def run(
    logits: np.ndarray, state: SamplerState, edited: Sequence[int] | None = None, **changes: Any
) -> tuple[SamplerState, Sampled]:
    """A step of the full sampler; every lane has the edits of its row unless said otherwise."""
    lanes = len(logits)
    edited = np.arange(lanes) if edited is None else edited
    inputs = inputs_of(lanes, edited=edited, **changes)
    return SAMPLE("full", jnp.asarray(logits, jnp.float32), state, inputs)


CASES = {
    "bias": {"logit_bias": {0: 100, 5: -100, 60: 3.5, 31: -0.25, 32: 1e-3}},
    "allowed": {"allowed_token_ids": [0, 31, 32, 60, 60]},
    "bad tokens": {"bad_words_token_ids": [[7], [60], [0]]},
    "bad words": {"bad_words_token_ids": [[1, 2, 3], [2, 4], [9, 2, 5], [3, 1, 2, 6]]},
    "together": {
        "logit_bias": {3: 100, 11: 50, 12: 60},
        "allowed_token_ids": [3, 10, 11, 12],
        "bad_words_token_ids": [[2, 12], [3]],
    },
}
OUTPUT = [5, 9, 3, 1, 2]


@pytest.mark.parametrize("case", CASES)
def test_greedy_lanes_choose_the_likeliest_of_the_edited_logits(case: str) -> None:
    """200 random lanes; edits are applied before the choice, and never to the log-probabilities."""
    logits = np.random.default_rng(1).standard_normal((200, VOCAB)).astype(np.float32) * 3
    params = SamplingParams(**CASES[case])
    state = state_with([params] * 200, [OUTPUT] * 200)
    _, result = run(logits, state, temperature=0.0)
    want = [edited_logits(line, params, OUTPUT).argmax() for line in logits]
    np.testing.assert_array_equal(result.tokens, want)
    raw = np.log(softmax(logits))
    np.testing.assert_allclose(
        result.logprobs[:, 0], raw[np.arange(200), np.asarray(result.tokens)], atol=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_edited_distribution(case: str) -> None:
    count = 8_000
    logits = np.random.default_rng(2).standard_normal(VOCAB)
    settings = dict(CASES[case])
    if "logit_bias" in settings:  # small enough to leave a choice
        settings["logit_bias"] = {t: b / 60 for t, b in settings["logit_bias"].items()}
    params = SamplingParams(**settings)
    state = state_with([params], [OUTPUT])
    state = SamplerState(
        jnp.zeros(count, jnp.int32),
        jnp.zeros((count, VOCAB), jnp.int32),
        jnp.tile(state.edits, (count, 1)),
    )
    _, result = run(np.tile(logits, (count, 1)), state)
    counts = np.bincount(result.tokens, minlength=VOCAB)
    expected = count * softmax(edited_logits(logits, params, OUTPUT))
    assert counts[expected == 0].sum() == 0
    left = expected > 0
    degrees = left.sum() - 1
    statistic = ((counts[left] - expected[left]) ** 2 / expected[left]).sum()
    assert abs(statistic - degrees) / np.sqrt(2 * degrees) < 4


def test_the_bias_comes_before_the_penalties_and_the_temperature() -> None:
    """A repetition penalty divides what the bias made positive."""
    logits = np.array([[-1.0, 1.2]], np.float32)
    state = state_with([SamplingParams(logit_bias={0: 5.0})], [[]], vocab=2)
    state = SamplerState(state.last_token, jnp.array([[1, 0]], jnp.int32), state.edits)
    _, result = run(logits, state, temperature=0.0, repetition_penalty=3.0)
    assert result.tokens.tolist() == [0]  # 4 / 3 against 1.2
    _, result = run(logits, state, temperature=0.0, repetition_penalty=4.0)
    assert result.tokens.tolist() == [1]  # 4 / 4 against 1.2


@pytest.mark.parametrize(
    ("output", "banned"),
    [
        ([], {4}),
        ([2], {4, 3}),
        ([1, 2], {4, 3}),
        ([9, 1, 2], {4, 3, 5}),
        ([9, 1, 2, 7], {4}),
        ([2, 9, 1], {4}),
    ],
    ids=str,
)
def test_a_bad_word_bans_its_last_token_where_the_others_end_the_output(
    output: list[int], banned: set[int]
) -> None:
    params = SamplingParams(bad_words_token_ids=[[4], [2, 3], [9, 1, 2, 5]])
    allowed = []
    for token in range(VOCAB):
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, token] = 9
        _, result = run(logits, state_with([params], [output]), temperature=0.0)
        allowed += [token] if result.tokens[0] == token else []
    assert set(range(VOCAB)) - set(allowed) == banned


def test_the_longest_bad_word_counts_in_full() -> None:
    word = list(range(1, MAX_BAD_WORD_TOKENS + 1))
    params = SamplingParams(bad_words_token_ids=[word])
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, word[-1]] = 9
    outputs = [[7, *word[:-1]], [7, 60, *word[1:-1]]]
    _, result = run(logits, state_with([params] * 2, outputs), temperature=0.0)
    assert (np.asarray(result.tokens) == word[-1]).tolist() == [False, True]


def test_the_device_remembers_what_was_chosen() -> None:
    """The host knows a token only steps later; the word 1 2 3 is caught all the same."""
    params = SamplingParams(bad_words_token_ids=[[1, 2, 3]])
    state = state_with([params], [[8]])
    chosen = []
    for likeliest in (1, 2, 3, 1, 3):
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, [likeliest, 40]] = 9, 8
        state, result = run(logits, state, temperature=0.0)
        chosen.append(int(result.tokens[0]))
    assert chosen == [1, 2, 40, 1, 3]
    assert edits.lookup(state.edits, jnp.array([0])).recent[0, -6:].tolist() == [8, *chosen]


@pytest.mark.parametrize("params", [SamplingParams(**case) for case in CASES.values()], ids=CASES)
def test_lanes_without_edits_are_what_they_would_be_alone(params: SamplingParams) -> None:
    """Even in a row that still holds the edits of another request."""
    logits = logits_of(3, lanes=8)
    state = state_with([params] * 8, [OUTPUT] * 8)
    settings = {"top_p": 0.9, "repetition_penalty": 1.2}
    _, plain = SAMPLE("sample", jnp.asarray(logits), state, inputs_of(8, **settings))
    one_edited = [8, 8, 2, 8, 8, 8, 8, 8]
    after, mixed = run(logits, state, one_edited, **settings)
    bystanders = np.arange(8) != 2
    np.testing.assert_array_equal(mixed.tokens[bystanders], plain.tokens[bystanders])
    np.testing.assert_array_equal(after.edits[bystanders], state.edits[bystanders])


def test_neutral_edits_change_no_token() -> None:
    logits = logits_of(4)
    lanes = len(logits)
    neutral = [
        SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), 0.0)),
        SamplingParams(allowed_token_ids=list(range(VOCAB))),
        SamplingParams(bad_words_token_ids=[[3, 4]]),
    ]
    _, plain = run(logits, empty_state(lanes, VOCAB), [lanes] * lanes)
    for params in neutral:
        _, result = run(logits, state_with([params] * lanes, [[1]] * lanes))
        for one, two in zip((plain.tokens, plain.rank), (result.tokens, result.rank)):
            np.testing.assert_array_equal(one, two)


def test_nothing_left_fails_the_lane_alone() -> None:
    nothing = SamplingParams(allowed_token_ids=[3], bad_words_token_ids=[[3]])
    something = SamplingParams(allowed_token_ids=[3])
    state = state_with([nothing, something], [[], []])
    _, result = run(np.zeros((2, VOCAB)), state)
    assert result.tokens.tolist() == [BAD_ROW, 3]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 1500])
def test_any_width_of_the_vocabulary_and_as_many_biases_as_there_may_be(vocab: int) -> None:
    last = vocab - 1
    count = min(vocab, MAX_LOGIT_BIAS)
    biases = dict.fromkeys(range(vocab - count, vocab), -1.0) | {last: 2.0}
    asked = [SamplingParams(allowed_token_ids=[last]), SamplingParams(logit_bias=biases)]
    _, result = run(np.zeros((2, vocab)), state_with(asked, [[], []], vocab), temperature=0.0)
    assert result.tokens.tolist() == [last, last]
