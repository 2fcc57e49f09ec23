"""The op for NVIDIA GPUs, in Pallas with the Triton backend: decode attention's kernel, whose
programs make their query themselves.

Each of a lane's items normalizes and rotates the query's heads anew, which costs less than a kernel
that does it once. The item with the lane's last keys stores the new key and value before it reads
them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.paged_attention import triton_decode
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.triton_common import LOG2_E
from pallas_kernels.paged_attention.triton_decode import Config
from pallas_kernels.paged_attention.variant import Variant
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm, Result
from pallas_kernels.triton_heads import load_sum, scaled


def decode_attention(
    qkv: jax.Array,
    cos_sin: CosSin | None,
    norm: HeadNorm | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    dtype: jnp.dtype,
    scale: float,
    sliding_window: int | None = None,
    variant: Variant | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Result:
    """See ``api.decode_attention``; ``interpret`` runs the kernel on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Triton kernel has no {dtype} version")
    _, tokens, kv_heads, parts, size = qkv.shape
    q = jax.ShapeDtypeStruct((tokens, kv_heads * (parts - 2), size), dtype)
    config = config or triton_decode.chosen(q, k_pages, batch)
    options = triton_decode.static(q, k_pages, config, scale * LOG2_E, sliding_window, interpret)
    inputs = (
        triton_decode.items(batch),
        triton_decode.arrivals(k_pages, batch),
        page_table,
        k_pages,
        v_pages,
        variant or Variant(),
        qkv,
        (page, slot),
        cos_sin,
        None if norm is None else (norm.q_scale, norm.k_scale),
    )
    out, k_pages, v_pages, *_ = pl.pallas_call(
        functools.partial(_kernel, eps=None if norm is None else norm.eps, **options),
        name="decode_attention",
        grid=triton_decode.grid(k_pages, batch),
        out_shape=[
            q,
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
            *triton_decode.unfinished(q, k_pages, batch),
        ],
        input_output_aliases={3: 1, 4: 2},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
    )(*inputs)
    return out, k_pages, v_pages


def _kernel(
    items_ref, arrivals_ref, table_ref, _k_ref, _v_ref, variant_refs, qkv_ref, place_refs,
    cos_sin_refs, scale_refs, out_ref, k_ref, v_ref, *unfinished_refs, eps, **options,
):  # fmt: skip
    def load(facts: tuple[Any, ...], head: Any, member: jax.Array, column: jax.Array, exists: Any):
        end, token, kv_len = facts[2], facts[5], facts[6]
        source = _Heads(qkv_ref, token, head, cos_sin_refs, eps, out_ref.dtype)
        q_scale, k_scale = scale_refs if scale_refs is not None else (None, None)

        @pl.when(end == kv_len)
        def _():
            line = jnp.arange(column.shape[1])
            real = line < source.size
            group = jnp.full(line.shape, options["group"])
            k = source.rotated(group, line, real, k_scale)
            v = source.load(group + 1, line, real)
            page, slot = (ref[token] for ref in place_refs)
            place = [jnp.full(line.shape, one) for one in (page, head, slot)]
            plt.store(k_ref.at[(*place, line)], k.astype(k_ref.dtype), mask=real)
            plt.store(v_ref.at[(*place, line)], v.astype(v_ref.dtype), mask=real)

        if options["parallel"]:  # other threads than those that stored them read key and value
            plt.debug_barrier()
        return source.rotated(member, column, exists, q_scale)

    triton_decode.attend(
        load, items_ref, arrivals_ref, table_ref, k_ref, v_ref, variant_refs, out_ref,
        *unfinished_refs, **options,
    )  # fmt: skip


class _Heads:
    """Queries, key and value of a token and a KV head, as ``rope_kv_write`` makes them."""

    def __init__(self, qkv_ref, token, head, cos_sin_refs, eps, dtype) -> None:
        self.qkv_ref, self.token, self.head = qkv_ref, token, head
        self.cos_sin_refs, self.eps, self.dtype = cos_sin_refs, eps, dtype
        self.size = qkv_ref.shape[4]

    def load(self, member: jax.Array, column: jax.Array, exists: Any) -> jax.Array:
        """The sum of the terms, rounded."""
        token, head = (jnp.full(column.shape, one) for one in (self.token, self.head))
        return load_sum(self.qkv_ref, (token, head, member, column), exists, self.dtype)

    def rotated(
        self, member: jax.Array, column: jax.Array, exists: Any, scale_ref: Any
    ) -> jax.Array:
        """Normalized, if there is a scale, and rotated."""
        own = self.load(member, column, exists).astype(jnp.float32)
        factor = None
        if scale_ref is not None:
            mean = jnp.sum(own * own, axis=-1, keepdims=own.ndim > 1) / self.size
            factor = lax.rsqrt(mean + self.eps)
            own = self._scaled(own * factor, scale_ref, column, exists)
        if self.cos_sin_refs is None:
            return own.astype(self.dtype)
        pairs = self.cos_sin_refs[0].shape[1]
        first, turns = column < pairs, exists & (column < 2 * pairs)
        partner = jnp.where(first, column + pairs, column - pairs)
        other = self.load(member, partner, turns).astype(jnp.float32)
        if factor is not None:
            other = self._scaled(other * factor, scale_ref, partner, turns)
        angle = jnp.full(column.shape, self.token), jnp.where(first, column, column - pairs)
        cos, sin = (plt.load(ref.at[angle], mask=turns, other=0) for ref in self.cos_sin_refs)
        turned = own * cos + jnp.where(first, -other, other) * sin
        return jnp.where(turns, turned, own).astype(self.dtype)

    def _scaled(self, x: jax.Array, scale_ref: Any, column: jax.Array, exists: Any) -> jax.Array:
        return scaled(x, plt.load(scale_ref.at[column], mask=exists, other=0), self.dtype)
