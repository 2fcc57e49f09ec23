"""Latent attention for NVIDIA GPUs, in Pallas with the Triton backend.

Two kernels write into one output: tiles of queries (prefill chunks), and decode items
(``triton_decode.py``).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.latent_attention.triton_common import (
    attend,
    column_blocks,
    empty_carry,
    load,
    store_result,
)
from pallas_kernels.latent_attention.triton_decode import Config, candidates, decode, tuning_key
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.triton_common import MIN_ROWS

__all__ = ["Config", "candidates", "latent_attention", "tuning_key"]

LOG2_E = math.log2(math.e)


def latent_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    latent_size: int,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.latent_attention``; ``config`` is the decode kernel's, and ``interpret`` runs the
    kernels on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernels need a GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Triton kernels have no {q.dtype} version")
    scale *= LOG2_E  # exponentials are taken to base 2
    # Zeros, since no program writes the places that no lane owns.
    out = jnp.zeros((*q.shape[:2], latent_size), q.dtype)
    if batch.tile_lane.shape[0]:
        out = _tiles(q, pages, page_table, batch, out, scale, interpret)
    return decode(q, pages, page_table, batch, out, scale=scale, config=config, interpret=interpret)


def _tiles(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    out: jax.Array,
    scale: float,
    interpret: bool,
) -> jax.Array:
    members = power_of_two(q.shape[1])
    in_all = max(MIN_ROWS, batch.tile_tokens * members)
    wide = q.dtype == jnp.float32
    rows = min(in_all, 16 if wide else 64)
    kernel = functools.partial(
        _tile_kernel,
        tile=16 if wide else 32,
        rows=rows,
        members=members,
        tokens=batch.tile_tokens,
        scale=scale,
    )
    return pl.pallas_call(
        kernel,
        name="latent_prefill",
        grid=(pl.cdiv(in_all, rows), batch.tile_lane.shape[0]),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={9: 0},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=8 if rows >= 64 else 4, num_stages=2),
    )(
        batch.tile_lane,
        batch.tile_start,
        batch.query_start,
        batch.query_len,
        batch.kv_len,
        batch.row,
        page_table,
        pages,
        q,
        out,
    )


def _tile_kernel(
    lane_ref, tile_start_ref, query_start_ref, query_len_ref, kv_len_ref, row_ref, table_ref,
    pages_ref, q_ref, into_ref, out_ref,
    *, tile, rows, members, tokens, scale,
):  # fmt: skip
    block, item = pl.program_id(0), pl.program_id(1)
    lane = lane_ref[item]
    length, kv_len = query_len_ref[lane], kv_len_ref[lane]
    latent, rotated = column_blocks(out_ref.shape[2], q_ref.shape[2])

    # The heads of one token fill ``members`` rows, those of its tile ``tokens * members``, of which
    # this program has ``rows``. (Floor division costs sign handling; not div.)
    first_row = block * rows
    in_tile = lax.div(first_row + jnp.arange(rows), members)
    head = lax.rem(first_row + jnp.arange(rows), members)
    offset = tile_start_ref[item]
    stop = jnp.minimum(length, offset + tokens)
    query = offset + in_tile
    used = (query < stop) & (head < q_ref.shape[1])
    index = (jnp.where(used, query_start_ref[lane] + query, 0), jnp.where(used, head, 0))
    q = load(q_ref, index, used, latent + rotated)

    before = kv_len - length  # the lane's tokens of earlier steps
    first = offset + lax.div(first_row, members)
    last = jnp.minimum(offset + lax.div(first_row + rows - 1, members), stop - 1)
    end = before + last + 1
    busy = first < stop
    # Tiles wholly before the first query need no mask.
    whole = jnp.where(busy, lax.div(before + first + 1, tile), 0)
    every = jnp.where(busy, lax.div(end + tile - 1, tile), 0)

    def seen(key: jax.Array) -> jax.Array:
        return (before + query)[:, None] >= key[None, :]

    go = functools.partial(
        attend,
        cache=(table_ref, pages_ref),
        row=row_ref[lane],
        keys=(0, end),
        tile=tile,
        blocks=latent + rotated,
        scale=scale,
    )
    carry = go(empty_carry(rows, latent), q, (0, whole), None)
    carry = go(carry, q, (whole, every), seen)
    store_result(out_ref, index, used, latent, carry)
