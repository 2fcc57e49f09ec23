"""What changes the logits before a token is drawn: small pure functions, applied in order.

Each takes and gives float32 logits [L, vocab]; a token that must not be chosen gets -inf. Sums and
counts over the vocabulary stand in for sorting it: a threshold is found by bisection over the
bits of the floats, which is exact and needs 32 passes, whatever k or p is.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.sampling.inputs import SamplingInputs

PROMPT_FLAG = 1 << 30
"""Added to a token's count where the token stands in the prompt."""


def forbid(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Rules out ``inputs.forbidden``, such as end tokens before ``min_tokens`` is reached."""
    lanes = jnp.arange(logits.shape[0])[:, None]
    # -1 would wrap to the last token: send it behind the end, where a scatter drops it.
    tokens = jnp.where(inputs.forbidden < 0, logits.shape[1], inputs.forbidden)
    return logits.at[lanes, tokens].set(-jnp.inf, mode="drop")


def penalize(logits: jax.Array, counts: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Repetition, frequency and presence penalties; counts int32 [L, vocab] as in ``sample``."""
    in_output = counts & (PROMPT_FLAG - 1)
    repetition = jnp.where(counts > 0, inputs.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= inputs.frequency_penalty[:, None] * in_output
    return logits - inputs.presence_penalty[:, None] * (in_output > 0)


def scale_by_temperature(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Divides by the temperature; greedy lanes stay as they are."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    return logits / temperature[:, None]


def keep_min_p(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Keeps tokens at least ``min_p`` times as likely as the likeliest."""
    floor = logits.max(-1, keepdims=True) + jnp.log(inputs.min_p)[:, None]
    return jnp.where(logits >= floor, logits, -jnp.inf)


def keep_top_k(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Keeps the k likeliest tokens, and those that tie with the last of them."""
    vocab = logits.shape[-1]
    k = jnp.where((inputs.top_k <= 0) | (inputs.top_k > vocab), vocab, inputs.top_k)

    def enough(threshold: jax.Array) -> jax.Array:
        return jnp.sum(keys >= threshold, axis=-1, keepdims=True) >= k[:, None]

    keys = _ordered_bits(logits)
    return jnp.where(keys >= _highest(enough, logits.shape[0]), logits, -jnp.inf)


def keep_top_p(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Keeps the fewest likeliest tokens whose probabilities reach ``top_p``, and ties with the
    last of them; top_p 1 keeps all."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    # Rounding could leave the whole sum below a top_p close to 1.
    goal = jnp.minimum(inputs.top_p[:, None], probabilities.sum(-1, keepdims=True))

    def enough(threshold: jax.Array) -> jax.Array:
        mass = jnp.sum(jnp.where(keys >= threshold, probabilities, 0), axis=-1, keepdims=True)
        return (mass >= goal) & (mass > 0)  # a tiny top_p is zero in float32

    keys = _ordered_bits(logits)
    keep = (keys >= _highest(enough, logits.shape[0])) | (inputs.top_p >= 1)[:, None]
    return jnp.where(keep, logits, -jnp.inf)


TRUNCATIONS = (keep_min_p, keep_top_k, keep_top_p)
"""In the order of application, after temperature."""


def truncate(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """All truncations; skipped on the device when no lane asks for any."""

    def apply_all(logits: jax.Array) -> jax.Array:
        for stage in TRUNCATIONS:
            logits = stage(logits, inputs)
        return logits

    wanted = (inputs.min_p > 0) | (inputs.top_k > 0) | (inputs.top_p < 1)
    return jax.lax.cond(jnp.any(wanted), apply_all, lambda x: x, logits)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 keys in the same order as the floats (two's complement; NaN excepted)."""
    # -0.0 must equal 0.0 (adding 0.0 would do, but XLA removes that).
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _highest(enough: Callable[[jax.Array], jax.Array], lanes: int) -> jax.Array:
    """The highest int32 threshold [lanes, 1] for which ``enough`` holds; it must be monotonic and
    hold for the lowest."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        # The rounded-up mean of low and high without overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        holds = enough(middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    low = jnp.full((lanes, 1), limits.min, jnp.int32)
    high = jnp.full((lanes, 1), limits.max, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]
