"""Chooses the next token of every lane on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxserve.sampling import edits, stages
from jaxserve.sampling.inputs import SamplingInputs
from jaxserve.sampling.params import MAX_LOGPROBS

Variant = Literal["greedy", "sample", "full"]
"""What a step's lanes need at most: only argmax; any of the settings that travel with each step;
log-probabilities and edits of single logits too."""

VARIANTS: tuple[Variant, ...] = ("greedy", "sample", "full")
"""Each does what those before it do, with the same tokens."""

SAMPLERS = VARIANTS[1:]
"""Those with a program of their own; the forward pass chooses greedily anyway."""

BAD_ROW = -1
"""The token of a lane whose logits held NaN or left nothing to choose."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Result of one step.

    Attributes:
        tokens: int32 [L]; BAD_ROW where a lane has to fail.
        logprobs: float32 [L, 1 + n], of the chosen token, then of the n likeliest; None unless
            the variant is "full".
        top_tokens: int32 [L, n].
        rank: int32 [L], of the chosen token; 1 is the likeliest.
    """

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    rank: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """Device state by row.

    Attributes:
        last_token: int32 [rows], the token chosen last; the next step's input.
        counts: int32 [rows, vocab], occurrences in the output, plus PROMPT_FLAG where the token
            stands in the prompt. Kept for rows with penalties only.
        edits: int32 [rows, words], see ``edits``. Kept for rows with edits only.
    """

    last_token: jax.Array
    counts: jax.Array
    edits: jax.Array


def sample(
    variant: Variant, logits: jax.Array, state: SamplerState, inputs: SamplingInputs
) -> tuple[SamplerState, Sampled]:
    """Chooses a token per lane from float32 logits [L, vocab].

    A lane's draw depends on its seed and output index only, not on the other lanes.

    Returns:
        The new state and the result.
    """
    bad = ~jnp.isfinite(logits.max(-1))
    if variant == "greedy":
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        tokens = jnp.where(bad, BAD_ROW, tokens)
        return _remember(state, tokens, inputs), Sampled(tokens)
    adjusted, table = logits, state.edits
    if variant == "full":
        asked = edits.lookup(table, inputs.edited)
        adjusted = stages.forbid_bad_words(stages.allow(adjusted, asked), asked)
    counts = state.counts[jnp.minimum(inputs.row, state.counts.shape[0] - 1)]
    adjusted = stages.forbid(adjusted, inputs)
    if variant == "full":
        adjusted = stages.add_bias(adjusted, asked)
    adjusted = stages.penalize(adjusted, counts, inputs)
    bad |= ~jnp.isfinite(adjusted.max(-1))
    scaled = stages.truncate(stages.scale_by_temperature(adjusted, inputs), inputs)
    drawn = jnp.argmax(scaled + _gumbel(inputs, logits.shape[-1]), -1)
    tokens = jnp.where(inputs.temperature > 0, drawn, jnp.argmax(adjusted, -1)).astype(jnp.int32)
    tokens = jnp.where(bad, BAD_ROW, tokens)
    new_counts = state.counts.at[inputs.row, jnp.maximum(tokens, 0)].add(1, mode="drop")
    result = Sampled(tokens)
    if variant == "full":
        result = with_logprobs(logits, tokens)
        table = edits.remember(table, inputs.edited, asked, tokens)
    state = replace(state, counts=new_counts, edits=table)
    return _remember(state, tokens, inputs), result


def count_tokens(
    counts: jax.Array, row: jax.Array, token_ids: jax.Array, of_prompt: jax.Array, first: jax.Array
) -> jax.Array:
    """Enters a piece of a request's tokens into its row of ``counts`` [rows, vocab].

    Args:
        row: int32 scalar.
        token_ids: int32 [n], padded with -1.
        of_prompt: bool [n], whether each is part of the prompt.
        first: bool scalar; clears the row beforehand.
    """
    line = jnp.where(first, 0, counts[row])
    vocab = counts.shape[1]
    prompt = jnp.where(of_prompt & (token_ids >= 0), token_ids, vocab)
    output = jnp.where(of_prompt | (token_ids < 0), vocab, token_ids)
    marked = jnp.zeros(vocab, jnp.int32).at[prompt].set(stages.PROMPT_FLAG, mode="drop")
    line = (line | marked).at[output].add(1, mode="drop")
    return counts.at[row].set(line)


def _gumbel(inputs: SamplingInputs, vocab: int) -> jax.Array:
    """Gumbel noise float32 [L, vocab]: its argmax with logits is a draw from their softmax."""

    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, index), (vocab,), jnp.float32)

    return jax.vmap(one)(inputs.seed, inputs.output_index)


def with_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    """Log-probabilities of given tokens [L] and of the likeliest ones, from logits [L, vocab]."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)
    top, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    rank = jnp.sum(logprobs > chosen, axis=-1) + 1
    return Sampled(
        tokens,
        jnp.concatenate([chosen, top], axis=-1),
        top_tokens.astype(jnp.int32),
        rank.astype(jnp.int32),
    )


def _remember(state: SamplerState, tokens: jax.Array, inputs: SamplingInputs) -> SamplerState:
    kept = jnp.maximum(tokens, 0)  # a bad lane's surplus step must still read a real token
    return replace(state, last_token=state.last_token.at[inputs.row].set(kept, mode="drop"))
