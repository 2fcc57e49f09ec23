"""What one step feeds the model: the fixed-shape arrays of a bucket."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pallas_kernels.paged_attention import AttentionBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """Arrays of one step with T token places and L lanes (requests in the step).

    Padding tokens write to page 0; padding lanes have no query tokens and sample from token 0.

    Attributes:
        token_ids, positions: int32 [T].
        rope_lengths: int32 [T], see ``rope.cos_sin``.
        write_page, write_slot: int32 [T], where each token's keys and values go.
        sample_index: int32 [L], which token's logits each lane wants.
        page_table: int32 [rows, pages], the pages of each row in order.
        attention: which tokens see what.
    """

    token_ids: jax.Array
    positions: jax.Array
    rope_lengths: jax.Array
    write_page: jax.Array
    write_slot: jax.Array
    sample_index: jax.Array
    page_table: jax.Array
    attention: AttentionBatch
