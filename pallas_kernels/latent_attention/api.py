"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.latent_attention import reference, triton
from pallas_kernels.paged_attention.batch import AttentionBatch

IMPLEMENTATIONS = {
    "triton": triton.latent_attention,
    "reference": reference.latent_attention,
}


def latent_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    latent_size: int,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + causal mask) v, where v is the first part of k.

    Args:
        q: [T, heads, size].
        pages: [pages, 1, page_size, size], holding this step's tokens too.
        page_table: int32 [rows, n], the pages of each row in order of position.
        batch: the lanes and the plan, for one KV head.
        scale: multiplies the scores.
        latent_size: how many of a key's dimensions are its value.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        [T, heads, latent_size] in q's dtype; places that no lane owns hold unspecified finite
        values.

    Raises:
        ValueError: shapes don't fit together.
        ExceptionGroup: no implementation can run the case.
    """
    if pages.shape[1] != 1 or pages.shape[3] != q.shape[2] or latent_size > q.shape[2]:
        raise ValueError(f"q {q.shape}, pages {pages.shape} and latent_size={latent_size} differ")
    return dispatch.call(
        "latent_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        pages,
        page_table,
        batch,
        scale=scale,
        latent_size=latent_size,
    )
