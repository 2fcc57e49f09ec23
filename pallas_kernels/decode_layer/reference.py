"""The op as the references of the ops that it joins. Runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.decode_layer.types import Experts, GatedMLP, LayerWeights
from pallas_kernels.expert_ffn.reference import expert_ffn
from pallas_kernels.fused_linear.reference import fused_linear
from pallas_kernels.paged_attention import AttentionBatch
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm
from pallas_kernels.route_experts.reference import route_experts


def decode_layer(
    x: jax.Array,
    qkv: jax.Array,
    cos_sin: CosSin | None,
    head_norm: HeadNorm | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    weights: LayerWeights,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``api.decode_layer``."""
    heads, k_pages, v_pages = decode_attention(
        *(qkv, cos_sin, head_norm, k_pages, v_pages, page, slot, page_table, batch),
        dtype=x.dtype,
        scale=scale,
        sliding_window=sliding_window,
    )
    x = x + fused_linear(heads.reshape(1, -1), weights.out)
    x = x + _feed_forward(weights.ffn, rms_norm(x, weights.norm.scale, weights.norm.eps))
    h = rms_norm(x, weights.next_norm.scale, weights.next_norm.eps)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x, fused_linear(h, weights.next, out_dtype=wide), k_pages, v_pages


def _feed_forward(ffn: GatedMLP | Experts, h: jax.Array) -> jax.Array:
    if isinstance(ffn, GatedMLP):
        return fused_linear(fused_linear(h, ffn.up, silu_gated=True), ffn.down)
    experts, weights = route_experts(
        h, ffn.router, top_k=ffn.top_k, normalize=ffn.normalize, scale=ffn.scale
    )
    return expert_ffn(h, experts, weights, ffn.up, ffn.down).sum(0)
