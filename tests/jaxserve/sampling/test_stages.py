"""Each stage against plain numpy in float64, which sorts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling import stages
from jaxserve.sampling.inputs import SamplingInputs

VOCAB = 61
LANES = 24


def inputs_of(lanes: int, **changes: Any) -> SamplingInputs:
    """Settings per lane that change nothing, but for those given: one value or one per lane."""
    neutral = {
        "row": np.arange(lanes),
        "output_index": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    whole = ("row", "output_index", "top_k")
    arrays = {
        name: jnp.asarray(
            np.broadcast_to(value, (lanes,)), jnp.int32 if name in whole else jnp.float32
        )
        for name, value in (neutral | {n: v for n, v in changes.items() if n in neutral}).items()
    }
    seed = changes.get("seed", np.stack([np.zeros(lanes), np.arange(lanes)], axis=1))
    forbidden = changes.get("forbidden", np.full((lanes, 4), -1))
    return SamplingInputs(
        **arrays,
        seed=jnp.asarray(seed, jnp.uint32),
        forbidden=jnp.asarray(forbidden, jnp.int32),
        edited=jnp.asarray(changes.get("edited", np.full(lanes, lanes)), jnp.int32),
    )


def logits_of(seed: int, lanes: int = LANES, vocab: int = VOCAB) -> np.ndarray:
    """Random logits float32 [lanes, vocab]; every other lane has many ties."""
    logits = 3 * np.random.default_rng(seed).standard_normal((lanes, vocab)).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept(logits: np.ndarray, **changes: Any) -> np.ndarray:
    """Which tokens the truncations keep; those must be unchanged and the others -inf."""
    out = np.asarray(
        jax.jit(stages.truncate)(jnp.asarray(logits), inputs_of(len(logits), **changes))
    )
    keep = np.isfinite(out)
    np.testing.assert_array_equal(out[keep], logits[keep])
    assert np.isneginf(out[~keep]).all()
    return keep


# --- truncations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 17, VOCAB - 1])
def test_top_k_keeps_the_k_likeliest_and_ties_with_the_last(k: int) -> None:
    logits = logits_of(k)
    last = -np.sort(-logits, axis=-1)[:, k - 1 : k]
    np.testing.assert_array_equal(kept(logits, top_k=k), logits >= last)


@pytest.mark.parametrize("k", [0, -1, VOCAB, VOCAB + 1, 2**31 - 1])
def test_top_k_that_is_off_or_too_large_keeps_all(k: int) -> None:
    assert kept(logits_of(1), top_k=k).all()


def top_p_oracle(logits: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens must be kept, and which may be, given float32's rounding of the mass."""
    probabilities = softmax(logits)
    # The mass of all tokens that are likelier than each token.
    before = np.array(
        [[row[line > logit].sum() for logit in line] for row, line in zip(probabilities, logits)]
    )
    return before < top_p - 1e-6, before < top_p + 1e-6


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_it_and_ties(top_p: float) -> None:
    logits = logits_of(3)
    keep = kept(logits, top_p=top_p)
    must, may = top_p_oracle(logits, top_p)
    assert keep[must].all()
    assert not keep[~may].any()


@pytest.mark.parametrize("top_p", [1e-38, 1e-45, 1e-300])
def test_the_smallest_top_p_keeps_the_likeliest_token(top_p: float) -> None:
    """Also where float32 has nothing but zero for it."""
    logits = logits_of(4)
    keep = kept(logits, top_p=top_p)
    np.testing.assert_array_equal(keep, logits == logits.max(-1, keepdims=True))


def test_top_p_close_to_one_keeps_nearly_all_and_one_keeps_all() -> None:
    """A flat vocabulary of 100,000 whose float32 sum falls short of 1."""
    logits = np.zeros((1, 100_000), np.float32)
    assert kept(logits, top_p=np.nextafter(np.float32(1), np.float32(0))).all()
    logits = logits_of(5)
    logits[:, 3] = -80  # far below what a sum of float32 can see
    assert kept(logits, top_p=1.0).all()


@pytest.mark.parametrize("min_p", [1e-30, 0.01, 0.2, 0.9, 1.0])
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(min_p: float) -> None:
    logits = logits_of(6)
    keep = kept(logits, min_p=min_p)
    ratio = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    assert keep[ratio > min_p * (1 + 1e-5)].all()
    assert not keep[ratio < min_p * (1 - 1e-5)].any()
    assert keep[logits == logits.max(-1, keepdims=True)].all()


def test_all_truncations_together_are_one_after_the_other() -> None:
    """min_p first, then top_k, then top_p among what is left."""
    logits = logits_of(7)
    expected = np.where(kept(logits, min_p=0.02), logits, -np.inf)
    last = -np.sort(-expected, axis=-1)[:, 7:8]
    expected = np.where(expected >= last, expected, -np.inf)
    must, may = top_p_oracle(expected, 0.8)
    keep = kept(logits, min_p=0.02, top_k=8, top_p=0.8)
    left = np.isfinite(expected)
    assert keep[must & left].all()
    assert not keep[~(may & left)].any()


def test_each_lane_has_its_own_settings() -> None:
    logits = logits_of(8)
    top_k, top_p = np.arange(LANES) % 5, np.where(np.arange(LANES) % 3, 1.0, 0.6)
    together = kept(logits, top_k=top_k, top_p=top_p)
    for lane in range(LANES):
        alone = kept(logits[lane : lane + 1], top_k=top_k[lane], top_p=top_p[lane])
        np.testing.assert_array_equal(together[lane], alone[0])


def test_minus_infinity_and_both_zeros() -> None:
    """-0.0 and 0.0 tie; a token that is ruled out already stays so and counts for nothing."""
    logits = np.array([[0.0, -0.0, -np.inf, -1.0]], np.float32)
    np.testing.assert_array_equal(kept(logits, top_k=1), [[True, True, False, False]])
    np.testing.assert_array_equal(kept(logits, top_k=3, top_p=0.99), [[True, True, False, True]])


# --- what changes values --------------------------------------------------------------------------


def test_neutral_settings_change_not_one_bit() -> None:
    logits = logits_of(9)
    logits[0, :5] = [-np.inf, 1e38, -1e38, 1e-30, -0.0]
    counts = np.random.default_rng(0).integers(0, 9, logits.shape).astype(np.int32)
    counts[:, ::3] |= stages.PROMPT_FLAG
    inputs = inputs_of(LANES)

    def all_stages(x: jax.Array) -> jax.Array:
        x = stages.penalize(stages.forbid(x, inputs), jnp.asarray(counts), inputs)
        x = stages.scale_by_temperature(x, inputs)
        return stages.truncate(x, inputs)

    for function in (all_stages, jax.jit(all_stages)):
        np.testing.assert_array_equal(np.asarray(function(jnp.asarray(logits))), logits)


def test_penalties_follow_their_formulas() -> None:
    rng = np.random.default_rng(1)
    logits = logits_of(10)
    in_output = rng.integers(0, 4, logits.shape)
    in_prompt = rng.random(logits.shape) < 0.3
    repetition = rng.uniform(0.5, 2, LANES)
    presence, frequency = rng.uniform(-2, 2, (2, LANES))
    settings = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    counts = in_output | np.where(in_prompt, stages.PROMPT_FLAG, 0)
    got = stages.penalize(
        jnp.asarray(logits), jnp.asarray(counts, jnp.int32), inputs_of(LANES, **settings)
    )
    want = logits.astype(np.float64)
    seen = in_prompt | (in_output > 0)
    scaled = np.where(want > 0, want / repetition[:, None], want * repetition[:, None])
    want = np.where(seen, scaled, want)
    # Only the repetition penalty looks at the prompt.
    want = want - frequency[:, None] * in_output - presence[:, None] * (in_output > 0)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_temperature_divides_and_zero_does_not() -> None:
    logits = logits_of(11, lanes=3)
    temperature = np.array([0.5, 0.0, 2.0], np.float32)
    got = stages.scale_by_temperature(jnp.asarray(logits), inputs_of(3, temperature=temperature))
    np.testing.assert_allclose(got, logits / np.array([[0.5], [1], [2]], np.float32), rtol=1e-6)


def test_forbid_rules_out_the_listed_tokens_and_no_other() -> None:
    logits = logits_of(12, lanes=3)
    forbidden = [[0, VOCAB - 1, 7, -1], [-1, -1, -1, -1], [5, 5, -1, 6]]
    got = np.asarray(stages.forbid(jnp.asarray(logits), inputs_of(3, forbidden=forbidden)))
    want = logits.copy()
    for lane, tokens in enumerate(forbidden):
        want[lane, [token for token in tokens if token >= 0]] = -np.inf
    np.testing.assert_array_equal(got, want)
