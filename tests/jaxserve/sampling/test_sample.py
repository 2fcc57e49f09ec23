"""The sampler: distributions, independence of lanes, bad rows, log-probabilities, state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling import edits, stages
from jaxserve.sampling.params import MAX_LOGPROBS
from jaxserve.sampling.sample import BAD_ROW, Sampled, SamplerState, Variant, count_tokens, sample
from tests.jaxserve.sampling.test_stages import inputs_of, logits_of, softmax

SAMPLE = jax.jit(sample, static_argnums=0)
MIXED = {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}


def run(
    variant: Variant, logits: np.ndarray, rows: int | None = None, **changes: Any
) -> tuple[SamplerState, Sampled]:
    """One step from an empty state with a row per lane, or ``rows`` of them."""
    lanes, vocab = logits.shape
    state = empty_state(rows or lanes, vocab)
    return SAMPLE(variant, jnp.asarray(logits), state, inputs_of(lanes, **changes))


def empty_state(rows: int, vocab: int) -> SamplerState:
    """Zeros, as the engine makes them."""
    return SamplerState(
        last_token=jnp.zeros(rows, jnp.int32),
        counts=jnp.zeros((rows, vocab), jnp.int32),
        edits=jnp.zeros((rows, edits.line_size(vocab)), jnp.int32),
    )


def tokens_of(variant: Variant, logits: np.ndarray, **changes: Any) -> np.ndarray:
    return np.asarray(run(variant, logits, **changes)[1].tokens)


def draws(logits: np.ndarray, count: int, **changes: Any) -> np.ndarray:
    """How often each token of one distribution is drawn, with ``count`` seeds."""
    tokens = tokens_of("sample", np.tile(logits.astype(np.float32), (count, 1)), **changes)
    assert (tokens >= 0).all()
    return np.bincount(tokens, minlength=len(logits))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic, standardized to mean 0 and deviation 1 for many degrees of freedom."""
    expected = counts.sum() * probabilities
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


# --- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = np.random.default_rng(2).standard_normal(16)
    counts = draws(logits, 10_000, temperature=temperature)
    assert abs(chi_square(counts, softmax(logits / temperature))) < 4


def test_draws_follow_the_softmax_along_one_requests_output() -> None:
    """One seed, many output indices: what a long text draws from."""
    logits = np.random.default_rng(3).standard_normal(16)
    counts = draws(logits, 10_000, output_index=np.arange(10_000), seed=np.full((10_000, 2), 5))
    assert abs(chi_square(counts, softmax(logits))) < 4


def test_truncated_draws_follow_what_is_left() -> None:
    logits = np.linspace(0, 3, 16)
    counts = draws(logits, 10_000, top_k=6)
    assert counts[:10].sum() == 0
    assert abs(chi_square(counts[10:], softmax(logits[10:]))) < 4


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    logits = np.zeros(8)
    logits[3] = 50
    logits[5] = -np.inf
    counts = draws(logits, 4_000, forbidden=np.tile([3, -1, -1, -1], (4_000, 1)))
    assert counts[3] == counts[5] == 0
    assert (counts[[0, 1, 2, 4, 6, 7]] > 0).all()


@pytest.mark.parametrize("settings", [{"temperature": 0.01}, {"top_k": 1}, {"top_p": 1e-45}])
def test_settings_that_leave_one_token_choose_the_likeliest(settings: dict[str, float]) -> None:
    logits = np.random.default_rng(4).standard_normal((200, 300)).astype(np.float32)
    logits[np.arange(200), np.arange(200)] += 6
    np.testing.assert_array_equal(tokens_of("sample", logits, **settings), logits.argmax(-1))


@pytest.mark.parametrize("variant", ["greedy", "sample", "full"])
def test_greedy_lanes_get_the_first_of_the_likeliest_in_every_variant(variant: Variant) -> None:
    logits = logits_of(5)
    got = tokens_of(variant, logits, temperature=0.0)
    np.testing.assert_array_equal(got, logits.argmax(-1))
    assert got.dtype == np.int32


# --- lanes ----------------------------------------------------------------------------------------


def test_a_lanes_draw_depends_on_its_seed_and_output_index_only() -> None:
    rng = np.random.default_rng(6)
    logits = logits_of(6)
    lanes = len(logits)
    seed = rng.integers(0, 2**32, (lanes, 2), np.uint32)
    index = rng.integers(0, 99, lanes)
    first = tokens_of("sample", logits, seed=seed, output_index=index, **MIXED)
    order = rng.permutation(lanes)
    second = tokens_of(
        "sample", logits[order], seed=seed[order], output_index=index[order], row=order, **MIXED
    )
    np.testing.assert_array_equal(second, first[order])
    for lane in range(3):
        one = slice(lane, lane + 1)
        alone = tokens_of("sample", logits[one], seed=seed[one], output_index=index[one], **MIXED)
        assert alone[0] == first[lane]


def test_both_halves_of_the_seed_and_the_index_matter() -> None:
    logits = np.zeros((4, 5000), np.float32)
    seed, index = [[0, 1], [1, 0], [0, 0], [0, 1]], [0, 0, 1, 1]
    tokens = tokens_of("sample", logits, seed=seed, output_index=index)
    assert len(set(tokens.tolist())) == 4


@pytest.mark.parametrize("variant", ["greedy", "sample", "full"])
@pytest.mark.parametrize(
    "bad",
    [[np.nan, 0], [np.inf, 0], [np.inf, -np.inf], [-np.inf, -np.inf]],
    ids=["nan", "inf", "both infinities", "nothing left"],
)
def test_a_bad_row_is_flagged_and_leaves_the_others_alone(
    variant: Variant, bad: list[float]
) -> None:
    logits = logits_of(7)
    state, clean = run(variant, logits, **MIXED)
    spoilt = logits.copy()
    spoilt[5] = -np.inf if not np.isfinite(bad).any() else logits[5]
    spoilt[5, 10:12] = bad
    spoilt_state, result = run(variant, spoilt, **MIXED)
    assert result.tokens[5] == BAD_ROW
    others = np.arange(len(logits)) != 5
    for one, two in zip(jax.tree.leaves(clean), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[others], np.asarray(two)[others])
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(spoilt_state), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[others], np.asarray(two)[others])
    assert spoilt_state.last_token[5] == 0  # the surplus step must read a real token


def test_a_row_with_everything_forbidden_is_bad() -> None:
    logits = np.zeros((2, 4), np.float32)
    forbidden = [[0, 1, 2, 3], [0, 1, 2, -1]]
    assert tokens_of("sample", logits, forbidden=forbidden).tolist() == [BAD_ROW, 3]


# --- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_and_ranks_are_of_the_raw_logits() -> None:
    """Before temperature, penalties and truncation; ties share the better rank."""
    logits = logits_of(8)
    lanes = len(logits)
    _, result = run("full", logits, temperature=1.7, top_k=9)
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    want = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    tokens, lane = np.asarray(result.tokens), np.arange(lanes)
    np.testing.assert_allclose(result.logprobs[:, 0], want[lane, tokens], atol=1e-5)
    np.testing.assert_array_equal(result.rank, 1 + (logits > logits[lane, tokens][:, None]).sum(-1))
    assert result.top_tokens.shape == (lanes, MAX_LOGPROBS)
    np.testing.assert_allclose(
        result.logprobs[:, 1:], -np.sort(-want, axis=-1)[:, :MAX_LOGPROBS], atol=1e-5
    )
    top_tokens = np.asarray(result.top_tokens)
    np.testing.assert_allclose(
        np.take_along_axis(want, top_tokens, -1), result.logprobs[:, 1:], atol=1e-5
    )
    assert all(len(set(row)) == MAX_LOGPROBS for row in top_tokens.tolist())


def test_logprobs_change_no_token_and_small_vocabularies_have_fewer() -> None:
    logits = logits_of(9, vocab=7)
    _, result = run("full", logits)
    np.testing.assert_array_equal(result.tokens, tokens_of("sample", logits))
    assert result.top_tokens.shape == (len(logits), 7)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["greedy", "sample"])
def test_lanes_that_sample_nothing_leave_the_state_alone(variant: Variant) -> None:
    """Their row is the number of rows."""
    logits = logits_of(10, lanes=3)
    state, result = run(variant, logits, rows=4, row=[2, 4, 0])
    tokens = np.asarray(result.tokens)
    np.testing.assert_array_equal(state.last_token, [tokens[2], 0, tokens[0], 0])
    counts = np.zeros((4, logits.shape[1]), int)
    if variant == "sample":
        counts[2, tokens[0]] = counts[0, tokens[2]] = 1
    np.testing.assert_array_equal(state.counts, counts)


def test_the_penalties_see_what_was_counted() -> None:
    """A strong frequency penalty walks through a flat vocabulary without repeating itself."""
    state = empty_state(1, 6)
    seen = []
    for _ in range(6):
        state, result = SAMPLE(
            "sample",
            jnp.zeros((1, 6)),
            state,
            inputs_of(1, temperature=0.0, frequency_penalty=2.0),
        )
        seen.append(int(result.tokens[0]))
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(state.counts, np.ones((1, 6)))


@pytest.mark.parametrize("piece", [3, 8])
def test_counting_in_pieces_counts_all(piece: int) -> None:
    """The prompt is flagged, the output counted; only the given row changes, cleared first."""
    ids = [5, 1, 5, 2, 5, 5, 1, 9]
    num_prompt = 4
    counts = jnp.full((3, 10), 77, jnp.int32)
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        padded = jnp.asarray(part + [-1] * (piece - len(part)))
        of_prompt = jnp.arange(start, start + piece) < num_prompt
        counts = count_tokens(counts, jnp.int32(1), padded, of_prompt, jnp.bool_(start == 0))
    want = np.zeros(10, int)
    want[[1, 2, 5]] = stages.PROMPT_FLAG
    for token in ids[num_prompt:]:
        want[token] += 1
    np.testing.assert_array_equal(counts[1], want)
    np.testing.assert_array_equal(np.asarray(counts)[[0, 2]], 77)
