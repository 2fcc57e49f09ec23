"""The op for NVIDIA GPUs, in Pallas with the Triton backend: one kernel instead of XLA's five.

A program handles a few tokens of one KV head. It holds each head in two halves, so that what
rotates together stands in the same place of both; dimensions that don't rotate fill their rest.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm, Result
from pallas_kernels.triton_heads import load_sum, scaled

ROWS = 32
"""Rows (tokens times heads) that a program handles at least, so that large steps need few."""


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
    interpret: bool = False,
) -> Result:
    """See ``api.rope_kv_write``; ``interpret`` runs the kernel on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    _, tokens, kv_heads, parts, size = qkv.shape
    if size % 2:
        raise NotImplementedError("the Triton kernel is for heads of even size only")
    members = power_of_two(parts)
    # Few tokens are spread over many programs; many tokens share one.
    block = 1 if tokens <= 256 else max(1, ROWS // members)
    optional = [*(cos_sin or ())] + ([norm.q_scale, norm.k_scale] if norm is not None else [])
    inputs = [qkv, page, slot, *optional, k_pages, v_pages]
    kernel = functools.partial(
        _kernel,
        tokens=tokens,
        block=block,
        members=members,
        width=power_of_two(size // 2),
        pairs=0 if cos_sin is None else cos_sin[0].shape[1],
        eps=None if norm is None else norm.eps,
        dtype=dtype,
    )
    pools = {len(inputs) - 2: 1, len(inputs) - 1: 2}
    q, k_pages, v_pages = pl.pallas_call(
        kernel,
        name="rope_kv_write",
        grid=(-(-tokens // block), kv_heads),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, kv_heads * (parts - 2), size), dtype),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        input_output_aliases=pools,
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=1 if block == 1 else 4, num_stages=1),
    )(*inputs)
    return q, k_pages, v_pages


def _kernel(
    qkv_ref, page_ref, slot_ref, *others,
    tokens, block, members, width, pairs, eps, dtype,
):  # fmt: skip
    refs: list[Any] = list(others)
    cos_sin_refs = [refs.pop(0) for _ in range(2 if pairs else 0)]
    scale_refs = [refs.pop(0) for _ in range(0 if eps is None else 2)]
    _, _, q_ref, k_ref, v_ref = refs
    _, _, _, parts, size = qkv_ref.shape
    half, group, rows = size // 2, parts - 2, block * members

    head = pl.program_id(1)
    token = pl.program_id(0) * block + lax.div(jnp.arange(rows), members)
    member = lax.rem(jnp.arange(rows), members)
    real = (token < tokens) & (member < parts)

    def spread(values):
        return jnp.broadcast_to(values[:, None], (rows, width))

    column = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    exists = spread(real) & (column < half)
    turns = column < pairs
    left, right = column, column + half  # the dimensions that the two halves hold
    if 0 < pairs < half:
        left = jnp.where(turns, column, column + pairs)
        right = jnp.where(turns, column + pairs, column + half)
    heads = jnp.full((rows, width), head)
    index = spread(token), heads, spread(member)

    first, second = (load_sum(qkv_ref, (*index, side), exists, dtype) for side in (left, right))
    is_value = spread(member == parts - 1)
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    if eps is not None:
        mean = (jnp.sum(a * a, 1) + jnp.sum(b * b, 1)) / size
        factor = lax.rsqrt(mean + eps)[:, None]
        is_key = spread(member >= group)
        a = _scaled(a * factor, scale_refs, left, exists, is_key, dtype)
        b = _scaled(b * factor, scale_refs, right, exists, is_key, dtype)
    if pairs:
        cos, sin = (
            plt.load(ref.at[spread(token), column], mask=exists & turns, other=0)
            for ref in cos_sin_refs
        )
        turned = a * cos - b * sin, b * cos + a * sin
        a, b = turned if pairs == half else (jnp.where(turns, *x) for x in zip(turned, (a, b)))
    a = jnp.where(is_value, first, a.astype(dtype))
    b = jnp.where(is_value, second, b.astype(dtype))

    is_query = exists & spread(member < group)
    query = spread(token), spread(head * group + member)
    plt.store(q_ref.at[*query, left], a, mask=is_query)
    plt.store(q_ref.at[*query, right], b, mask=is_query)
    page = plt.load(page_ref.at[token], mask=real, other=0)
    slot = plt.load(slot_ref.at[token], mask=real, other=0)
    for ref, which in ((k_ref, group), (v_ref, group + 1)):
        mask = exists & spread(member == which)
        # Masked rows point to the padding page: the interpreter lets them write, old values.
        place = spread(jnp.where(member == which, page, 0)), heads, spread(slot)
        plt.store(ref.at[*place, left], a.astype(ref.dtype), mask=mask)
        plt.store(ref.at[*place, right], b.astype(ref.dtype), mask=mask)


def _scaled(x, scale_refs, column, exists, is_key, dtype):
    """x scaled, see ``scaled``, by the keys' scale or the queries'."""
    q_scale, k_scale = (plt.load(ref.at[column], mask=exists, other=0) for ref in scale_refs)
    return scaled(x, jnp.where(is_key, k_scale, q_scale), dtype)
