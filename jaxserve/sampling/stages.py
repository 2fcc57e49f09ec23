"""What changes the logits before a token is drawn: small pure functions, applied in order.

Each takes and gives float32 logits [L, vocab]; a token that must not be chosen gets -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.sampling.edits import Edits
from jaxserve.sampling.inputs import SamplingInputs
from pallas_kernels.truncation_threshold import truncation_threshold

PROMPT_FLAG = 1 << 30
"""Added to a token's count where the token stands in the prompt."""


def allow(logits: jax.Array, edits: Edits) -> jax.Array:
    """Rules out the tokens that ``edits.allowed`` doesn't have."""
    token = jnp.arange(logits.shape[1])
    bits = edits.allowed[:, token // 32] >> (token % 32)
    return jnp.where(bits & 1, logits, -jnp.inf)


def forbid_bad_words(logits: jax.Array, edits: Edits) -> jax.Array:
    """Rules out the last token of each sequence whose other tokens end the output so far."""
    before, last = edits.bad_words[..., :-1], edits.bad_words[..., -1]
    matches = ((before < 0) | (before == edits.recent[:, None])).all(-1)
    return _rule_out(logits, jnp.where(matches, last, -1))


def add_bias(logits: jax.Array, edits: Edits) -> jax.Array:
    """Adds ``edits.bias`` to the logits of ``edits.bias_tokens``."""
    lanes = jnp.arange(logits.shape[0])[:, None]
    tokens = _unless_padding(edits.bias_tokens, logits.shape[1])
    return logits.at[lanes, tokens].add(edits.bias, mode="drop")


def forbid(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Rules out ``inputs.forbidden``, such as end tokens before ``min_tokens`` is reached."""
    return _rule_out(logits, inputs.forbidden)


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


def truncate(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Min-p, top-k and top-p, in this order; what they drop gets -inf."""
    threshold = truncation_threshold(logits, inputs.min_p, inputs.top_k, inputs.top_p)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def _rule_out(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The logits without ``tokens`` [L, n], padded with -1."""
    lanes = jnp.arange(logits.shape[0])[:, None]
    tokens = _unless_padding(tokens, logits.shape[1])
    return logits.at[lanes, tokens].set(-jnp.inf, mode="drop")


def _unless_padding(tokens: jax.Array, vocab: int) -> jax.Array:
    # -1 would wrap to the last token: send it behind the end, where a scatter drops it.
    return jnp.where(tokens < 0, vocab, tokens)
