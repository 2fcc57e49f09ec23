"""What one step feeds the model: the fixed-shape arrays of a bucket."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import AttentionBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """Arrays of one step with T token places and L lanes (requests in the step).

    Padding tokens write to page 0; padding lanes have no query tokens and sample from any token.

    Attributes:
        token_ids, positions: int32 [T].
        rope_lengths: int32 [T], see ``rope.cos_sin``.
        write_page: int32 [tables, T], the page that each token's keys and values go to, in each of
            the page tables; [T] for one table's layers.
        write_slot: int32 [T], where in that page.
        sample_index: int32 [L], which token's logits each lane wants; None if every lane has one
            token (T = L), its own.
        page_table: int32 [tables, rows, pages], the pages of each row in order; [rows, pages] for
            one table's layers.
        attention: which tokens see what; the decode items of each of the page tables in one more
            axis in front, which is missing for one table's layers.
    """

    token_ids: jax.Array
    positions: jax.Array
    rope_lengths: jax.Array
    write_page: jax.Array
    write_slot: jax.Array
    sample_index: jax.Array | None
    page_table: jax.Array
    attention: AttentionBatch

    @property
    def is_token(self) -> jax.Array:
        """bool [T], False for padding, which stands behind all lanes' tokens."""
        ends = self.attention.query_start + self.attention.query_len
        return jnp.arange(self.token_ids.shape[0]) < ends.max()

    def of_table(self, table: int) -> StepInputs:
        """What layers with that page table get."""
        return dataclasses.replace(
            self,
            write_page=self.write_page[table],
            page_table=self.page_table[table],
            attention=self.attention.of_plan(table),
        )
