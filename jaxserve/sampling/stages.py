"""What changes the logits before a token is drawn: small pure functions, applied in order.

Each takes and gives float32 logits [L, vocab]; a token that must not be chosen gets -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.sampling.inputs import SamplingInputs
from pallas_kernels.truncation_threshold import truncation_threshold

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


def truncate(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Min-p, top-k and top-p, in this order; what they drop gets -inf."""
    threshold = truncation_threshold(logits, inputs.min_p, inputs.top_k, inputs.top_p)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)
