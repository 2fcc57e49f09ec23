"""The op's signature and the order of its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.variant import Variant


def _triton() -> Callable[..., jax.Array]:
    """The Triton implementation, or where JAX lacks that backend, which it has deprecated, one that
    runs no case."""
    try:
        from pallas_kernels.paged_attention import triton
    except ImportError:

        def refuse(*args: Any, **kwargs: Any) -> jax.Array:
            raise NotImplementedError("this JAX has no Triton backend")

        return refuse
    return triton.paged_attention


IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.paged_attention,
    "triton": _triton(),
    "mosaic_gpu_only": mosaic_gpu.paged_attention_mosaic_only,
    "mosaic_tpu": mosaic_tpu.paged_attention,
    "reference": reference.paged_attention,
}


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    variant: Variant | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + causal mask) v for each lane of a ragged batch.

    Args:
        q: [T, heads, head_size].
        k_pages, v_pages: [pages, kv_heads, page_size, head_size], holding this step's tokens too;
            query head h reads KV head h // (heads / kv_heads).
        page_table: int32 [rows, n], the pages of each row in order of position.
        batch: the lanes and the plan.
        scale: multiplies the scores.
        sliding_window: a query sees this many tokens, itself included; None for all before it.
        variant: changes to the scores; None for plain attention, which all implementations do.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        [T, heads, head_size] in q's dtype; places that no lane owns hold unspecified finite values.

    Raises:
        ValueError: shapes don't fit together.
        ExceptionGroup: no implementation can run the case.
    """
    heads, head_size = q.shape[1:]
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_size:
        raise ValueError(f"q {q.shape}, k {k_pages.shape} and v {v_pages.shape} don't fit together")
    if heads % k_pages.shape[1]:
        raise ValueError(f"{heads} heads are no multiple of {k_pages.shape[1]} KV heads")
    variants = {} if variant is None else {"variant": variant}
    return dispatch.call(
        "paged_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        k_pages,
        v_pages,
        page_table,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        **variants,
    )
