"""The sampling settings of a step's lanes, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Settings per lane (L lanes); see SamplingParams for their meaning.

    Attributes:
        row: int32 [L], where the lane's counts and last token are kept; a row that doesn't exist
            (the number of rows) for lanes that sample nothing.
        output_index: int32 [L], index in the output of the token to choose.
        temperature, top_p, min_p: float32 [L]; temperature 0 means greedy.
        top_k: int32 [L]; 0 means all.
        repetition_penalty, presence_penalty, frequency_penalty: float32 [L].
        seed: uint32 [L, 2].
        forbidden: int32 [L, n], tokens that must not be chosen now, padded with -1.
        edited: int32 [L], the row whose edits apply; a row that doesn't exist for none.
    """

    row: jax.Array
    output_index: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array
    forbidden: jax.Array
    edited: jax.Array
