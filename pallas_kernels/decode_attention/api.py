"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import reference, triton
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention import AttentionBatch, Variant
from pallas_kernels.rope_kv_write import HeadNorm
from pallas_kernels.rope_kv_write.types import CosSin, Result

IMPLEMENTATIONS = {
    "triton": triton.decode_attention,
    "reference": reference.decode_attention,
}


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
    implementation: Implementation | None = None,
) -> Result:
    """``rope_kv_write`` and ``paged_attention`` in one, of a step in which every request has one
    token.

    Args:
        qkv, cos_sin, norm, k_pages, v_pages, page, slot: see ``rope_kv_write``.
        page_table, batch: see ``paged_attention``; no lane has more than one query, and all lanes'
            items together cover all keys that their queries see.
        dtype: of the queries and of the result.
        scale, sliding_window, variant: see ``paged_attention``.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        The heads' outputs [T, heads, head_size], of padding tokens anything, and the new pages.

    Raises:
        ValueError: the batch has tiles of queries.
        ExceptionGroup: no implementation can run the case.
    """
    if batch.tile_lane.shape[0]:
        raise ValueError("the batch has requests with several tokens")
    arguments = (qkv, cos_sin, norm, k_pages, v_pages, page, slot, page_table, batch)
    options = {"scale": scale, "sliding_window": sliding_window, "variant": variant}
    return dispatch.call(
        "decode_attention", IMPLEMENTATIONS, implementation, *arguments, dtype=dtype, **options
    )
