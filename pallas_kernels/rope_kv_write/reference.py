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
) -> Result:
    """See ``api.rope_kv_write``."""
    tokens, _, _, size = qkv.shape
    q = qkv[:, :, :-2].reshape(tokens, -1, size)
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    if norm is not None:
        q, k = rms_norm(q, norm.q_scale, norm.eps), rms_norm(k, norm.k_scale, norm.eps)
    if cos_sin is not None:
        q, k = _rotate(q, cos_sin), _rotate(k, cos_sin)
    k_pages = k_pages.at[page, :, slot].set(k.astype(k_pages.dtype))
    v_pages = v_pages.at[page, :, slot].set(v.astype(v_pages.dtype))
    return q, k_pages, v_pages


def _rotate(x: jax.Array, cos_sin: CosSin) -> jax.Array:
    cos, sin = (part[:, None, :] for part in cos_sin)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)
