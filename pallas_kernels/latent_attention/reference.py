"""The op in jnp. Runs anywhere."""

from __future__ import annotations

import jax

from pallas_kernels.paged_attention.batch import AttentionBatch
from pallas_kernels.paged_attention.reference import attend_pages


def latent_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    *,
    scale: float,
    latent_size: int,
) -> jax.Array:
    """See ``api.latent_attention``."""

    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = pages[ids]
        return keys, keys[..., :latent_size]

    return attend_pages(q, read, pages.shape, latent_size, page_table, batch, scale)
