"""The op for TPUs: XLA fuses norms and rotation well, so the Mosaic kernel only does the KV write.

XLA's own scatter copies whole pools once there are many tokens. The kernel copies the few slots of
a page that a DMA can address (a *unit*) into VMEM, enters the new tokens, and copies them back. A
slot is a fraction of a 32-bit row where the pages are narrower than 32 bits, so the smallest unit
are the slots of one such row. Tokens of the same unit must share a copy: the first of them in a
block of tokens is their *leader*. Blocks follow each other strictly.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lowering import can_lower_mosaic_tpu
from pallas_kernels.rope_kv_write import reference
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm, Result

BLOCK_BYTES = 4 << 20
"""VMEM for the units of a block of tokens; as much again goes into their keys and values."""
BLOCK_TOKENS = 128
"""Most tokens of a block; each needs a semaphore, of which a TPU core has 512."""
MANY_TOKENS = 256
"""More tokens than this come from prompts: most units are filled whole, so larger ones pay."""
MAX_TOKENS = 32 << 10
"""Their places must fit into SMEM, of which a TPU core has 1 MiB."""


def rope_kv_write(
    qkv: jax.Array,
    cos_sin: CosSin | None,
    norm: HeadNorm | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    *,
    dtype: jnp.dtype,
    interpret: Any = False,
) -> Result:
    """See ``api.rope_kv_write``; ``interpret`` (``pltpu.InterpretParams``) simulates a TPU."""
    if not interpret and not can_lower_mosaic_tpu():
        raise NotImplementedError("the Mosaic kernel needs a TPU")
    if k_pages.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the Mosaic kernel has no version for {k_pages.dtype} pages")
    tokens = page.shape[0]
    if k_pages.shape[2] % 8 or tokens > MAX_TOKENS:
        raise NotImplementedError(f"no Mosaic kernel for {tokens} tokens, pages {k_pages.shape}")
    q, k, v = reference.heads(qkv, cos_sin, norm, dtype)
    k, v = (x.astype(k_pages.dtype) for x in (k, v))
    return q, *_write(k, v, k_pages, v_pages, page, slot, interpret)


def _write(
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    tokens, kv_heads, size = k.shape
    itemsize = k_pages.dtype.itemsize
    unit = 8 if tokens > MANY_TOKENS else 4 // itemsize
    token_bytes = 2 * kv_heads * 8 * -(-size // 128) * 128 * itemsize
    block = min(tokens, BLOCK_TOKENS, max(8, BLOCK_BYTES // token_bytes // 8 * 8))
    leader, last = _plan(page, slot, unit, block)
    entered = pl.BlockSpec((block, kv_heads, size), lambda i, *_: (i, 0, 0))
    pool = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((block, kv_heads, unit, size), k_pages.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, tokens=tokens),
        name="kv_write",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-tokens // block),),
            in_specs=[entered, entered, pool, pool],
            out_specs=[pool, pool],
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((block,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_pages, v_pages)],
        input_output_aliases={6: 0, 7: 1},
        interpret=interpret,
    )(page, slot, leader, last, k, v, k_pages, v_pages)


def _plan(page: jax.Array, slot: jax.Array, unit: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Who shares a unit, int32 [T]: for each token its leader's place in their block, and whether
    the token is the last one of its unit there. The same for all layers, so XLA does it once."""
    tokens = page.shape[0]
    spare = -tokens % block

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.pad(x, (0, spare), constant_values=-1).reshape(-1, block)

    page, unit_of = blocks(page), blocks(slot // unit)
    same = (page[:, :, None] == page[:, None, :]) & (unit_of[:, :, None] == unit_of[:, None, :])
    place = jnp.arange(block, dtype=jnp.int32)
    leader = jnp.where(same, place, block).min(2)
    last = jnp.where(same, place, -1).max(2) == place
    return leader.reshape(-1)[:tokens], last.reshape(-1)[:tokens].astype(jnp.int32)


def _kernel(
    page_ref, slot_ref, leader_ref, last_ref, k_ref, v_ref, _, __, k_pages, v_pages,
    k_units, v_units, read, written,
    *, tokens,
):  # fmt: skip
    block, kv_heads, unit, size = k_units.shape
    first = pl.program_id(0) * block
    count = jnp.minimum(tokens - first, block)
    pools = ((k_pages, k_units, k_ref), (v_pages, v_units, v_ref))

    def copies(i, back):
        """The copies of the unit of the block's token i, which leads it, from or to its page."""
        start = pl.multiple_of(lax.div(slot_ref[first + i], unit) * unit, unit)
        for pages, units, _ in pools:
            home, buffer = pages.at[page_ref[first + i], :, pl.ds(start, unit)], units.at[i]
            if back:
                yield pltpu.make_async_copy(buffer, home, written)
            else:
                yield pltpu.make_async_copy(home, buffer, read.at[i])

    def for_leaders(do):
        def token(i, _):
            pl.when(leader_ref[first + i] == i)(functools.partial(do, i))
            return 0

        lax.fori_loop(0, count, token, 0)

    def fetch(i):
        for copy in copies(i, back=False):
            copy.start()

    def enter(i, _):
        lead = leader_ref[first + i]

        @pl.when(lead == i)
        def arrive():
            for copy in copies(i, back=False):
                copy.wait()

        own = lax.broadcasted_iota(jnp.int32, (kv_heads, unit, size), 1)
        own = own == lax.rem(slot_ref[first + i], unit)
        for _, units, new in pools:
            units[lead] = jnp.where(own, new[i][:, None, :], units[lead])

        @pl.when(last_ref[first + i] == 1)
        def leave():
            for copy in copies(lead, back=True):
                copy.start()

        return 0

    def finish(i):
        for copy in copies(i, back=True):
            copy.wait()

    for_leaders(fetch)
    lax.fori_loop(0, count, enter, 0)
    for_leaders(finish)
