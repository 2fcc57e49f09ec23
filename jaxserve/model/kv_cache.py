"""The paged KV cache: per layer one array of key pages and one of value pages.

Each is ``[pages, kv_heads, page_size, head_size]``: a (page, head) pair is one contiguous tile, and
the head axis splits over tensor-parallel devices. Layers with latent attention have one array with
one head, which every device holds. Page 0 belongs to padding tokens: they may write to it, and no
request reads it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.distributed import LOGICAL_TO_MESH
from jaxserve.model.config import LatentAttentionSpec, LayerSpec, ModelConfig

LayerCache = tuple[jax.Array, ...]
KVCache = tuple[LayerCache, ...]


def bytes_per_page(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page in all layers, keys and values, on all devices together."""
    per_token = sum(
        heads * size for layer in config.layers for heads, size in layer.attention.cached
    )
    return per_token * page_size * jnp.dtype(dtype).itemsize


def shapes(
    config: ModelConfig, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh
) -> Any:
    """The cache's shapes, dtypes and shardings: a KVCache of ShapeDtypeStructs."""

    def pages(layer: LayerSpec, heads: int, size: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition(layer))
        return jax.ShapeDtypeStruct((num_pages, heads, page_size, size), dtype, sharding=sharding)

    return tuple(
        tuple(pages(layer, *vector) for vector in layer.attention.cached) for layer in config.layers
    )


def partition(layer: LayerSpec) -> PartitionSpec:
    """How a layer's arrays are split over the devices."""
    whole = isinstance(layer.attention, LatentAttentionSpec)
    return PartitionSpec(None, None if whole else LOGICAL_TO_MESH["kv_heads"])


def partitions(config: ModelConfig) -> Any:
    """The PartitionSpecs of all arrays, a KVCache of them."""
    return tuple((partition(layer),) * len(layer.attention.cached) for layer in config.layers)
