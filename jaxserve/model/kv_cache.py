"""The paged KV cache: per layer one array of key pages and one of value pages.

Each is ``[pages, kv_heads, page_size, head_size]``: a (page, head) pair is one contiguous tile, and
the head axis splits over tensor-parallel devices. Page 0 belongs to padding tokens: they may write
to it, and no request reads it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.distributed import LOGICAL_TO_MESH
from jaxserve.model.config import LayerSpec, ModelConfig

LayerCache = tuple[jax.Array, jax.Array]
KVCache = tuple[LayerCache, ...]

PARTITION = PartitionSpec(None, LOGICAL_TO_MESH["kv_heads"])


def bytes_per_page(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page in all layers, keys and values, on all devices together."""
    per_token = sum(
        2 * layer.attention.num_kv_heads * layer.attention.head_size for layer in config.layers
    )
    return per_token * page_size * jnp.dtype(dtype).itemsize


def shapes(
    config: ModelConfig, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh
) -> Any:
    """The cache's shapes, dtypes and shardings: a KVCache of ShapeDtypeStructs."""
    sharding = NamedSharding(mesh, PARTITION)

    def pages(layer: LayerSpec) -> jax.ShapeDtypeStruct:
        spec = layer.attention
        shape = (num_pages, spec.num_kv_heads, page_size, spec.head_size)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return tuple((pages(layer), pages(layer)) for layer in config.layers)
