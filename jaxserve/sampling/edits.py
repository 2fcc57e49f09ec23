"""What single requests ask of single tokens' logits, kept on the device by row.

A row's edits are one line of int32 words, written when the row changes hands. -1 in every word
means no edits: all tokens allowed, no bias, no bad words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling.checks import (
    MAX_BAD_WORD_SEQUENCES,
    MAX_BAD_WORD_TOKENS,
    MAX_LOGIT_BIAS,
)
from jaxserve.sampling.params import SamplingParams

RECENT = MAX_BAD_WORD_TOKENS - 1
"""Output tokens that are remembered: those before the last of the longest bad word."""
SEQUENCES = (MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edits:
    """The edits of L lanes.

    Attributes:
        recent: int32 [L, RECENT], the last tokens of the output, padded with -1 on the left.
        bias_tokens: int32 [L, n], padded with -1.
        bias: float32 [L, n].
        bad_words: int32 [L, *SEQUENCES], padded with -1 on the left.
        allowed: int32 [L, words], bit t % 32 of word t // 32 allows token t.
    """

    recent: jax.Array
    bias_tokens: jax.Array
    bias: jax.Array
    bad_words: jax.Array
    allowed: jax.Array


def line_size(vocab: int) -> int:
    """Words of a row."""
    return RECENT + 2 * MAX_LOGIT_BIAS + SEQUENCES[0] * SEQUENCES[1] + -(-vocab // 32)


def line(params: SamplingParams, output: Sequence[int], vocab: int) -> np.ndarray:
    """A row's words, int32 [line_size], for a request with that output so far."""
    words = np.full(line_size(vocab), -1, np.int32)
    recent, bias_tokens, bias, bad_words, allowed = _split(words)
    last = output[-RECENT:]
    recent[RECENT - len(last) :] = last
    pairs = params.logit_bias or {}
    bias_tokens[: len(pairs)] = list(pairs)
    bias[: len(pairs)] = np.array(list(pairs.values()), np.float32).view(np.int32)
    bad_words = bad_words.reshape(SEQUENCES)
    for row, ids in zip(bad_words, params.bad_words_token_ids or ()):
        row[len(row) - len(ids) :] = ids
    if params.allowed_token_ids is not None:
        flags = np.zeros(32 * len(allowed), bool)
        flags[list(params.allowed_token_ids)] = True
        allowed[:] = np.packbits(flags, bitorder="little").view("<i4")
    return words


def lookup(table: jax.Array, row: jax.Array) -> Edits:
    """The edits of rows [L] of a table int32 [rows, line_size]; none for rows that don't exist."""
    words = table.at[row].get(mode="fill", fill_value=-1)
    recent, bias_tokens, bias, bad_words, allowed = _split(words)
    return Edits(
        recent=recent,
        bias_tokens=bias_tokens,
        bias=jax.lax.bitcast_convert_type(bias, jnp.float32),
        bad_words=bad_words.reshape(-1, *SEQUENCES),
        allowed=allowed,
    )


def remember(table: jax.Array, row: jax.Array, edits: Edits, tokens: jax.Array) -> jax.Array:
    """The table with each lane's token [L] entered as the last one of its row [L]."""
    recent = jnp.concatenate([edits.recent[:, 1:], tokens[:, None]], axis=1)
    return table.at[row, :RECENT].set(recent, mode="drop")


def write(table: jax.Array, row: jax.Array, words: jax.Array) -> jax.Array:
    """The table with a row's words [line_size] replaced."""
    return table.at[row].set(words)


def _split(words: Any) -> list[Any]:
    """The parts of a line, or of lines [L, line_size], in order."""
    ends = np.cumsum([RECENT, MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, SEQUENCES[0] * SEQUENCES[1]])
    starts = [0, *ends]
    return [words[..., start:end] for start, end in zip(starts, [*ends, words.shape[-1]])]
