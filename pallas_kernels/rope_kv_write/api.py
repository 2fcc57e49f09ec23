"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.rope_kv_write import mosaic_tpu, reference, triton
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm, Result

IMPLEMENTATIONS = {
    "triton": triton.rope_kv_write,
    "mosaic_tpu": mosaic_tpu.rope_kv_write,
    "reference": reference.rope_kv_write,
}


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
    implementation: Implementation | None = None,
) -> Result:
    """Normalizes and rotates queries and keys, and stores keys and values in their pages.

    Args:
        qkv: [S, T, kv_heads, group + 2, head_size], S terms to be added up; per KV head its
            queries, then its key and value.
        cos_sin: float32 [T, rotary_size / 2] each; dimensions i and i + rotary_size / 2 of the
            first rotary_size rotate together. None rotates nothing.
        norm: applied before the rotation; None for none.
        k_pages, v_pages: [pages, kv_heads, page_size, head_size], changed in place when donated.
        page, slot: int32 [T], where each token's key and value go. Places of different tokens
            differ, but for padding tokens, which may share one.
        dtype: of the sum of qkv's terms, and of the queries.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        The queries [T, kv_heads * group, head_size], and the new pages.

    Raises:
        ExceptionGroup: no implementation can run the case.
    """
    arguments = (qkv, cos_sin, norm, k_pages, v_pages, page, slot)
    return dispatch.call("rope_kv_write", IMPLEMENTATIONS, implementation, *arguments, dtype=dtype)
