"""The op in jnp. Runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm, Result


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
) -> Result:
    """See ``api.rope_kv_write``."""
    q, k, v = heads(qkv, cos_sin, norm, dtype)
    k_pages = k_pages.at[page, :, slot].set(k.astype(k_pages.dtype))
    v_pages = v_pages.at[page, :, slot].set(v.astype(v_pages.dtype))
    return q, k_pages, v_pages


def heads(
    qkv: jax.Array, cos_sin: CosSin | None, norm: HeadNorm | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The op up to the write: queries [T, heads, head_size], keys and values [T, kv_heads, ...]."""
    qkv = qkv.sum(0, dtype=jnp.float32).astype(dtype)
    tokens, _, _, size = qkv.shape
    q = qkv[:, :, :-2].reshape(tokens, -1, size)
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    if norm is not None:
        q, k = rms_norm(q, norm.q_scale, norm.eps), rms_norm(k, norm.k_scale, norm.eps)
    if cos_sin is not None:
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    return q, k, v


def rotate(x: jax.Array, cos_sin: CosSin) -> jax.Array:
    """Rotates x [T, heads, head_size] by ``api.rope_kv_write``'s cos_sin."""
    cos, sin = (part[:, None, :] for part in cos_sin)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, second = first.astype(wide), second.astype(wide)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)
