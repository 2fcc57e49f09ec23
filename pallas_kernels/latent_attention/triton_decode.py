"""Decoding: the attention of lanes with one query each, in Pallas with the Triton backend.

A program computes one item: one lane's query, of some of its heads, over a range of its keys. Items
of a lane that has several leave unfinished results in device memory, and the last of them to arrive
adds all up in the order of the keys, as in ``paged_attention/triton_decode.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.latent_attention.triton_common import (
    attend,
    column_blocks,
    empty_carry,
    load,
    places,
    rescaled,
    store_result,
)
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.triton_common import MASKED, MIN_ROWS


class Config(NamedTuple):
    """Keys per step of a program's loop, its heads, its warps, and the loads in flight."""

    tile: int
    rows: int
    warps: int
    stages: int


def decode(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    out: jax.Array,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``out`` with the places of the decode items replaced by their attention.

    Args:
        q, pages, page_table, batch: see ``api.latent_attention``.
        out: [T, heads, latent_size].
        scale: of the scores, times log2(e): exponentials are taken to base 2.
        config: None takes a tuned one.
    """
    config = config or _chosen(q, pages, batch)
    heads, latent_size = out.shape[1:]
    rows = min(config.rows, max(MIN_ROWS, power_of_two(heads)))
    head_blocks = pl.cdiv(heads, rows)
    lane = batch.decode_lane
    # Equal in all layers, so XLA makes it once per step. One row of it is one memory access.
    items = jnp.stack(
        [
            *(lane, batch.decode_start, batch.decode_end),
            *(batch.decode_first[lane], batch.decode_count[lane]),
            *(batch.query_start[lane], batch.row[lane]),
        ],
        axis=1,
    )
    count = lane.shape[0]
    kernel = functools.partial(
        _kernel, tile=config.tile, rows=rows, heads=heads, scale=scale, parallel=not interpret
    )
    zeros = jnp.zeros((batch.row.shape[0], head_blocks), jnp.int32)
    out, *_ = pl.pallas_call(
        kernel,
        name="latent_decode",
        grid=(head_blocks, count),  # programs that read the same keys run at the same time
        out_shape=[
            jax.ShapeDtypeStruct(out.shape, out.dtype),
            jax.ShapeDtypeStruct((count, heads, latent_size), jnp.float32),
            jax.ShapeDtypeStruct((count, heads), jnp.float32),
            jax.ShapeDtypeStruct((count, heads), jnp.float32),
        ],
        input_output_aliases={5: 0},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
    )(items, zeros, page_table, pages, q, out)
    return out


def _kernel(
    items_ref, arrivals_ref, table_ref, pages_ref, q_ref, into_ref,
    out_ref, values_ref, top_ref, total_ref,
    *, tile, rows, heads, scale, parallel,
):  # fmt: skip
    block, item = pl.program_id(0), pl.program_id(1)
    lane, start, end, first_item, count, token, row = (items_ref[item, i] for i in range(7))
    latent, rotated = column_blocks(out_ref.shape[2], q_ref.shape[2])
    head = block * rows + jnp.arange(rows)
    exists = head < heads
    index = (jnp.full((rows,), token), head)
    q = load(q_ref, index, exists, latent + rotated)
    carry = attend(
        empty_carry(rows, latent),
        q,
        (0, lax.div(end - start + tile - 1, tile)),
        lambda position: (position < end)[None, :],
        cache=(table_ref, pages_ref),
        row=row,
        keys=(start, end),
        tile=tile,
        blocks=latent + rotated,
        scale=scale,
    )

    @pl.when((count == 1) & (end > start))
    def _():
        store_result(out_ref, index, exists, latent, carry)

    def merge(number, carry):
        place = (jnp.full((rows,), first_item + number), head)
        values = load(values_ref, place, exists, latent)
        top = plt.load(top_ref.at[place], mask=exists, other=MASKED)
        total = plt.load(total_ref.at[place], mask=exists, other=0)
        new_top = jnp.maximum(carry[1], top)
        before = rescaled(carry, new_top)
        part = rescaled((tuple(values), top, total), new_top)
        sums = tuple(a + b for a, b in zip(before[0], part[0], strict=True))
        return sums, new_top, before[2] + part[2]

    @pl.when((count > 1) & (end > start))
    def _():
        own = (jnp.full((rows,), item), head)
        for columns, value in zip(latent, carry[0], strict=True):
            wide, mask = places(own, exists, columns)
            plt.store(values_ref.at[wide], value, mask=mask)
        plt.store(top_ref.at[own], carry[1], mask=exists)
        plt.store(total_ref.at[own], carry[2], mask=exists)
        if parallel:  # every thread's results are stored before one thread says so
            plt.debug_barrier()
        before = plt.atomic_add(arrivals_ref, (lane, block), jnp.ones((), jnp.int32))

        @pl.when(before == count - 1)
        def _():
            merged = lax.fori_loop(0, count, merge, empty_carry(rows, latent))
            store_result(out_ref, index, exists, latent, merged)
            arrivals_ref[lane, block] = 0


# --- configurations -------------------------------------------------------------------------------

SHARED_MEMORY = 224 << 10
"""Bytes of shared memory that a program may take on a Hopper GPU, less a little."""


def candidates(q: jax.Array, **arguments: Any) -> Iterable[Config]:
    """Configurations worth timing for these arguments of the op: those whose queries, and keys in
    flight, fit into the shared memory."""
    vector = q.shape[2] * q.dtype.itemsize
    most = max(MIN_ROWS, power_of_two(q.shape[1]))
    for rows in (rows for rows in (16, 32, 64, 128) if rows <= most):
        for tile in (16, 32, 64):
            for warps in (4, 8):
                for stages in (1, 2, 3):
                    if (rows + tile * stages) * vector <= SHARED_MEMORY:
                        yield Config(tile, rows, warps, stages)


def tuning_key(q: jax.Array, pages: jax.Array, batch: AttentionBatch, **arguments: Any) -> str:
    """What a tuned configuration depends on."""
    lanes, (_, heads, size) = power_of_two(batch.row.shape[0]), q.shape
    return f"decode {q.dtype} heads {heads} size {size} page_size {pages.shape[2]} lanes {lanes}"


def _chosen(q: jax.Array, pages: jax.Array, batch: AttentionBatch) -> Config:
    tuned = tuning.lookup("latent_attention", "triton", tuning_key(q, pages, batch))
    if tuned is not None:
        return Config(**tuned)
    # Not measured. Many heads share the reading of keys in the largest block whose sums, float32
    # [rows, latent], leave half of the registers free.
    if q.dtype == jnp.float32:
        return Config(16, 16, 4, 2)
    return Config(32, 64, 8, 2) if q.shape[1] >= 64 else Config(32, 16, 4, 2)
