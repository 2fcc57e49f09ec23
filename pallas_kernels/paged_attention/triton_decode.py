"""Decoding: the attention of lanes with one query each, in Pallas with the Triton backend.

A program computes one item: one lane's query (its whole GQA group in one matrix product) over a
range of its keys, for one KV head. Items of a lane that has several leave unfinished results in
device memory, and the last of them to arrive adds all up by the log-sum-exp rescaling of
FlashDecoding (Dao et al. 2023), in the order of the keys, so that results don't depend on timing.

Arrivals are counted in an array that is zero before and after: nobody else sees it change, so for
XLA it is a constant like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.triton_common import (
    MASKED,
    MIN_ROWS,
    RowVariant,
    empty_carry,
    first_carry,
    gather_keys,
    online_softmax,
    padded_width,
)
from pallas_kernels.paged_attention.variant import Variant

MERGED_AT_ONCE = 4
"""Unfinished results whose loads are in flight together."""


class Config(NamedTuple):
    """Keys per step of a program's loop, its warps, and the loads in flight."""

    tile: int
    warps: int
    stages: int


def decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    variant: Variant | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """q with the queries of the decode items replaced by their attention.

    Args:
        q, k_pages, v_pages, page_table, batch: see ``api.paged_attention``.
        scale: of the scores, times log2(e): exponentials are taken to base 2.
        window: the sliding window.
        variant: see ``api.paged_attention``, in natural units.
        config: None takes a tuned one.
    """
    config = config or chosen(q, k_pages, batch)
    out, *_ = pl.pallas_call(
        functools.partial(_kernel, **static(q, k_pages, config, scale, window, interpret)),
        name="paged_decode",
        grid=grid(k_pages, batch),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), *unfinished(q, k_pages, batch)],
        input_output_aliases={5: 0},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
    )(
        items(batch),
        arrivals(k_pages, batch),
        page_table,
        k_pages,
        v_pages,
        q,
        variant or Variant(),
    )
    return out


def items(batch: AttentionBatch) -> jax.Array:
    """What a program must know of each item: int32 [D, 8].

    Equal in all layers, so XLA makes it once per step. One row of it is one memory access.
    """
    lane = batch.decode_lane
    columns = [
        *(lane, batch.decode_start, batch.decode_end),
        *(batch.decode_first[lane], batch.decode_count[lane]),
        *(batch.query_start[lane], batch.kv_len[lane], batch.row[lane]),
    ]
    return jnp.stack(columns, axis=1)


def arrivals(k_pages: jax.Array, batch: AttentionBatch) -> jax.Array:
    """The counters of arrivals, by lane and head."""
    return jnp.zeros((batch.row.shape[0], k_pages.shape[1]), jnp.int32)


def grid(k_pages: jax.Array, batch: AttentionBatch) -> tuple[int, int]:
    """Heads and items: those in use come first, and their heads' keys lie side by side."""
    return k_pages.shape[1], batch.decode_lane.shape[0]


def unfinished(q: Any, k_pages: jax.Array, batch: AttentionBatch) -> list[jax.ShapeDtypeStruct]:
    """The items' weighted values, maxima and sums, where a lane has several."""
    count, kv_heads = batch.decode_lane.shape[0], k_pages.shape[1]
    by_head = (count, kv_heads, q.shape[1] // kv_heads)
    shapes = ((*by_head, q.shape[2]), by_head, by_head)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def static(
    q: Any, k_pages: jax.Array, config: Config, scale: float, window: int | None, interpret: bool
) -> dict[str, Any]:
    """What the kernel is specialised for."""
    group = q.shape[1] // k_pages.shape[1]
    return {
        "tile": config.tile,
        "rows": max(MIN_ROWS, power_of_two(group)),
        "width": padded_width(q.shape[2]),
        "scale": scale,
        "window": window,
        "group": group,
        "parallel": not interpret,
    }


def _kernel(items_ref, arrivals_ref, table_ref, k_ref, v_ref, q_ref, *refs, **options):
    def load(facts: tuple[Any, ...], head: Any, member: jax.Array, column: jax.Array, exists: Any):
        index = jnp.full(member.shape, facts[5]), head * options["group"] + member, column
        return plt.load(q_ref.at[index], mask=exists, other=0)

    attend(load, items_ref, arrivals_ref, table_ref, k_ref, v_ref, *refs, **options)


def attend(load: Callable[..., jax.Array], items_ref, *refs, **options) -> None:
    """A program's item, if it has one, of the query that ``load(facts, head, member, column,
    exists)`` gives."""
    head, item = pl.program_id(0), pl.program_id(1)
    facts = tuple(items_ref[item, i] for i in range(8))
    start, end = facts[1:3]
    # Most programs of a short step have no item: they are to end at once.
    pl.when(end > start)(functools.partial(_attend, load, head, item, facts, *refs, **options))


def _attend(
    load, head, item, facts, arrivals_ref, table_ref, k_ref, v_ref, variant_refs,
    out_ref, values_ref, top_ref, total_ref,
    *, tile, rows, width, scale, window, group, parallel,
):  # fmt: skip
    lane, start, end, first_item, count, token, kv_len, row = facts
    size, page_size = out_ref.shape[2], k_ref.shape[2]
    member = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, width))
    column = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    exists = (member < group) & (column < size)
    index = (jnp.full((rows, width), token), head * group + member, column)
    q = load(facts, head, member, column, exists)
    one = jnp.arange(rows)
    own = one < group
    variant = RowVariant.load(variant_refs, jnp.where(own, head * group + one, 0), own)
    first = start if window is None else jnp.maximum(start, kv_len - window)
    tiles = jnp.where(end > first, lax.div(end - first + tile - 1, tile), 0)

    def step(i, carry):
        position = first + i * tile + jnp.arange(tile)
        seen = position < end
        page = plt.load(
            table_ref.at[jnp.full((tile,), row), lax.div(position, page_size)],
            mask=seen,
            other=0,
        )
        slot = lax.rem(position, page_size)
        k = gather_keys(k_ref, page, head, slot, seen)
        v = gather_keys(v_ref, page, head, slot, seen)
        distance = (kv_len - 1 - position)[None, :]
        return online_softmax(carry, q, k, v, seen[None, :], scale, variant, distance)

    # Of a lane's items, the first one has the sink.
    carry = first_carry(rows, width, variant, item == first_item)
    values, top, total = lax.fori_loop(0, tiles, step, carry)

    @pl.when(count == 1)
    def _():
        plt.store(out_ref.at[index], (values / total[:, None]).astype(out_ref.dtype), mask=exists)

    def place(item):
        """Where an item's values, and its maxima and sums, are left."""
        wide = (jnp.full((rows, width), item), jnp.full((rows, width), head), member, column)
        return wide, (jnp.full((rows,), item), jnp.full((rows,), head), one)

    def merge(i, carry):
        values, top, total = carry
        parts = []
        for offset in range(MERGED_AT_ONCE):
            number = i * MERGED_AT_ONCE + offset
            there = number < count
            wide, narrow = place(first_item + number)
            parts.append(
                (
                    plt.load(values_ref.at[wide], mask=exists & there, other=0),
                    plt.load(top_ref.at[narrow], mask=own & there, other=MASKED),
                    plt.load(total_ref.at[narrow], mask=own & there, other=0),
                )
            )
        for part, part_top, part_total in parts:
            new_top = jnp.maximum(top, part_top)
            old, new = jnp.exp2(top - new_top), jnp.exp2(part_top - new_top)
            values = values * old[:, None] + part * new[:, None]
            top, total = new_top, total * old + part_total * new
        return values, top, total

    @pl.when(count > 1)
    def _():
        wide, narrow = place(item)
        plt.store(values_ref.at[wide], values, mask=exists)
        plt.store(top_ref.at[narrow], top, mask=own)
        plt.store(total_ref.at[narrow], total, mask=own)
        if parallel:  # every thread's results are stored before one thread says so
            plt.debug_barrier()
        before = plt.atomic_add(arrivals_ref, (lane, head), jnp.ones((), jnp.int32))

        @pl.when(before == count - 1)
        def _():
            steps = lax.div(count + MERGED_AT_ONCE - 1, MERGED_AT_ONCE)
            values, _, total = lax.fori_loop(0, steps, merge, empty_carry(rows, width))
            merged = (values / total[:, None]).astype(out_ref.dtype)
            plt.store(out_ref.at[index], merged, mask=exists)
            arrivals_ref[lane, head] = 0


# --- configurations -------------------------------------------------------------------------------


def candidates(q: jax.Array, k_pages: jax.Array, **arguments: Any) -> Iterable[Config]:
    """Configurations worth timing for these arguments of the op."""
    for tile in (16, 32, 64, 128):
        for warps in (1, 2) if tile < 32 else (1, 2, 4):
            for stages in (2, 3, 4):
                if tile * q.shape[2] * 4 * stages <= 96 << 10:
                    yield Config(tile, warps, stages)


def tuning_key(q: Any, k_pages: jax.Array, batch: AttentionBatch, **arguments: Any) -> str:
    """What a tuned configuration depends on."""
    lanes = power_of_two(batch.row.shape[0])
    return f"decode {q.dtype} head_size {q.shape[2]} page_size {k_pages.shape[2]} lanes {lanes}"


def chosen(q: Any, k_pages: jax.Array, batch: AttentionBatch) -> Config:
    """The configuration for queries of q's shape and dtype."""
    tuned = tuning.lookup("paged_attention", "triton", tuning_key(q, k_pages, batch))
    if tuned is not None:
        return Config(**tuned)
    # The best on an H200 over contexts of 150 to 32,768 tokens and 1 to 256 lanes.
    width = padded_width(q.shape[2])
    tile = (64 if width <= 128 else 32) // (2 if q.dtype == jnp.float32 else 1)
    return Config(tile, 2, 2) if width <= 64 else Config(tile, 4, 3)
