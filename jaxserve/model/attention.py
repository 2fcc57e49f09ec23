"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.distributed import local_part, reduce_terms
from jaxserve.model import kv_cache, norms, rope
from jaxserve.model.config import AttentionSpec, NormSpec
from jaxserve.model.inputs import StepInputs
from jaxserve.model.params import Param, Params, prefixed
from jaxserve.quant import linear_terms
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.paged_attention import Variant, paged_attention
from pallas_kernels.rope_kv_write import HeadNorm, rope_kv_write

MOST_JOINED = 64
"""Lanes up to which ``decode_attention`` was measured to be faster than its two halves."""


def declare(spec: AttentionSpec, hidden_size: int) -> dict[str, Param]:
    """Weights. ``qkv`` groups, per KV head, its query heads, then its key, then its value:
    [kv_heads, group + 2, head_size, hidden], so that splitting the first axis splits all three.
    """
    kv, size = spec.num_kv_heads, spec.head_size
    group = spec.num_heads // kv
    tree = {
        "qkv": Param((kv, group + 2, size, hidden_size), ("kv_heads", None, None, None)),
        "out": Param((hidden_size, kv, group * size), (None, "kv_heads", None)),
    }
    if spec.qkv_bias:
        tree["qkv_bias"] = Param((kv, group + 2, size), ("kv_heads", None, None), "zeros")
    if spec.out_bias:
        tree["out_bias"] = Param((hidden_size,), (None,), "zeros")
    if spec.sinks:
        tree["sinks"] = Param((spec.num_heads,), ("heads",), "zeros")
    if spec.qk_norm is not None and spec.qk_norm.kind == "layer":
        tree["qk_norm/scale"] = Param((kv, group + 1, size), ("kv_heads", None, None), "ones")
    elif spec.qk_norm is not None:
        tree |= prefixed("q_norm", norms.declare(spec.qk_norm, size))
        tree |= prefixed("k_norm", norms.declare(spec.qk_norm, size))
    return tree


def apply(
    spec: AttentionSpec,
    params: Params,
    x: jax.Array,
    cache: kv_cache.LayerCache,
    inputs: StepInputs,
    cos_sin: rope.CosSin | None,
    kernels: Kernels = CHOOSE,
    wanted: jax.Array | None = None,
) -> tuple[jax.Array, kv_cache.LayerCache]:
    """Attends from x [T, hidden] to each request's tokens so far.

    Args:
        wanted: int32 [W], the tokens whose output is wanted; None for all (W = T).

    Returns:
        Terms [S, W, hidden] whose sum is the output, and the layer's cache with this step's keys
        and values written.
    """
    qkv = linear_terms(x, params["qkv"], kernels.fused_linear)
    o, cache = attend(spec, params, qkv, cache, inputs, cos_sin, kernels, x.dtype)
    o = o if wanted is None else o[wanted]
    terms = linear_terms(o, params["out"], kernels.fused_linear)
    return reduce_terms(terms, params.get("out_bias")), cache


def attend(
    spec: AttentionSpec,
    params: Params,
    qkv: jax.Array,
    cache: kv_cache.LayerCache,
    inputs: StepInputs,
    cos_sin: rope.CosSin | None,
    kernels: Kernels,
    dtype: jnp.dtype,
) -> tuple[jax.Array, kv_cache.LayerCache]:
    """What lies between the two products: from the terms [S, T, kv_heads, group + 2, head_size] of
    queries, keys and values to the heads' outputs [T, kv_heads, group * head_size] of ``dtype``."""
    k_pages, v_pages = cache
    if spec.qkv_bias:
        qkv = qkv.sum(0, keepdims=True) + params["qkv_bias"]
    head_norm = rms_head_norm(spec, params)
    if spec.qk_norm is not None and head_norm is None:
        qkv = _normalize_heads(spec.qk_norm, params["qk_norm/scale"], qkv, dtype)
    place = inputs.write_page, inputs.write_slot
    own: dict[str, Any] = {
        "scale": spec.scale,
        "sliding_window": spec.sliding_window,
        "variant": _variant(spec, params),
    }
    if _joins(spec, kernels, qkv, inputs):
        try:
            o, k_pages, v_pages = decode_attention(
                *(qkv, cos_sin, head_norm, k_pages, v_pages, *place),
                *(inputs.page_table, inputs.attention),
                dtype=dtype,
                # Not the reference, where there are faster implementations of the two halves.
                implementation=kernels.decode_attention or "triton",
                **own,
            )
            return o.reshape(-1, *params["out"].shape[1:]), (k_pages, v_pages)
        except NotImplementedError:
            pass
    q, k_pages, v_pages = rope_kv_write(
        *(qkv, cos_sin, head_norm, k_pages, v_pages, *place),
        dtype=dtype,
        implementation=kernels.rope_kv_write,
    )
    if spec.log_length is not None:
        grown = jnp.log(inputs.positions + 1.0) / math.log(spec.log_length)
        q = (q * jnp.maximum(grown, 1.0)[:, None, None]).astype(dtype)
    o = paged_attention(
        *(q, k_pages, v_pages, inputs.page_table, inputs.attention),
        implementation=kernels.paged_attention,
        **own,
    )
    return o.reshape(-1, *params["out"].shape[1:]), (k_pages, v_pages)


def rms_head_norm(spec: AttentionSpec, params: Params) -> HeadNorm | None:
    """The RMSNorm over each query and key head; None if there is none, or another norm."""
    if spec.qk_norm is None or spec.qk_norm.kind != "rms":
        return None
    return HeadNorm(params["q_norm/scale"], params["k_norm/scale"], spec.qk_norm.eps)


def _joins(spec: AttentionSpec, kernels: Kernels, qkv: jax.Array, inputs: StepInputs) -> bool:
    """Whether rotation, write and attention are one kernel: in steps that only decode, where nobody
    wants other kernels for a part of it. Not with several terms, which each of a lane's items would
    add up anew, nor with more lanes than that was measured with."""
    decodes = inputs.attention.tile_lane.shape[0] == 0 and spec.log_length is None
    small = qkv.shape[0] == 1 and qkv.shape[1] <= MOST_JOINED
    return decodes and small and not (kernels.rope_kv_write or kernels.paged_attention)


def _normalize_heads(
    norm: NormSpec, scale: jax.Array, qkv: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Normalizes queries and keys with the scales [kv_heads, group + 1, head_size].

    Returns:
        One term [1, T, kv_heads, group + 2, head_size] of that dtype, of qkv's several.
    """
    qkv = qkv.sum(0, dtype=jnp.float32).astype(dtype)
    qk = norms.apply(norm, {"scale": scale}, qkv[:, :, :-1])
    return jnp.concatenate([qk, qkv[:, :, -1:]], 2)[None]


def _variant(spec: AttentionSpec, params: Params) -> Variant | None:
    """What the family changes of the scores."""
    if spec.softcap is None and not spec.sinks and not spec.alibi:
        return None
    slopes = None
    if spec.alibi:
        slopes = local_part(jnp.asarray(alibi_slopes(spec.num_heads) * spec.alibi_scale))
    return Variant(slopes, params.get("sinks"), spec.softcap)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of each head, float32 [num_heads] (Press et al. 2022, arXiv:2108.12409, section 3).

    For n heads, a power of two, they are 2^(-8/n), 2^(-16/n), ... For other numbers the authors'
    code takes those of the power below, then every second one of the power above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    exponents = [-8 * (i + 1) / below for i in range(below)]
    exponents += [-4 * (2 * i + 1) / below for i in range(num_heads - below)]
    return np.exp2(np.array(exponents)).astype(np.float32)
