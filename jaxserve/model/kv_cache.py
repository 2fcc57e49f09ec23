"""The paged KV cache: per layer one array of key pages and one of value pages.

Each is ``[pages, kv_heads, page_size, head_size]``: a (page, head) pair is one contiguous tile, and
the head axis splits over tensor-parallel devices. Page 0 belongs to padding tokens: they may write
to it, and no request reads it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.distributed import LOGICAL_TO_MESH
from jaxserve.model.config import ModelConfig

LayerCache = tuple[jax.Array, jax.Array]
KVCache = tuple[LayerCache, ...]

PARTITION = PartitionSpec(None, LOGICAL_TO_MESH["kv_heads"])


def bytes_per_page(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page in all layers, keys and values, on all devices together."""
    per_token = sum(
        2 * layer.attention.num_kv_heads * layer.attention.head_size for layer in config.layers
    )
    return per_token * page_size * jnp.dtype(dtype).itemsize


def allocate(
    config: ModelConfig, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh
) -> KVCache:
    """A zeroed cache. Zeroed, since 0 times an uninitialised NaN would spoil masked scores."""
    sharding = NamedSharding(mesh, PARTITION)

    def pages(layer_index: int) -> jax.Array:
        spec = config.layers[layer_index].attention
        shape = (num_pages, spec.num_kv_heads, page_size, spec.head_size)
        return jnp.zeros(shape, dtype, device=sharding)

    return tuple((pages(i), pages(i)) for i in range(len(config.layers)))
