"""The paged KV cache: an array of key pages and one of value pages per layer.

Each is ``[pages, kv_heads, page_size, head_size]``: a (page, head) pair is one contiguous tile, and
the head axis splits over tensor-parallel devices. Layers with latent attention have one array with
one head, which every device holds. Layers with different page tables share arrays, so the cache
has one entry per place, see ``ModelConfig.page_groups``. Page 0 belongs to padding tokens: they may
write to it, and no request reads it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.distributed import LOGICAL_TO_MESH
from jaxserve.model.config import AttentionSpec, LatentAttentionSpec, ModelConfig

LayerCache = tuple[jax.Array, ...]
KVCache = tuple[LayerCache, ...]


def bytes_per_page(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page, keys and values of one table's layers, on all devices together."""
    per_token = sum(heads * size for layer in _places(config) for heads, size in layer.cached)
    return per_token * page_size * jnp.dtype(dtype).itemsize


def bytes_per_token(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes that a token's keys and values take in all layers, on all devices together."""
    widths = [width for layer in config.layers for width in layer.attention.cached]
    return sum(heads * size for heads, size in widths) * jnp.dtype(dtype).itemsize


def _places(config: ModelConfig) -> list[AttentionSpec | LatentAttentionSpec]:
    """The attention of the first layer in each place."""
    places = config.page_groups.place
    return [config.layers[places.index(n)].attention for n in range(config.page_groups.num_places)]


def shapes(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
) -> Any:
    """The cache's shapes, dtypes and shardings: a KVCache of ShapeDtypeStructs."""

    def pages(spec: AttentionSpec | LatentAttentionSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
        sharding = NamedSharding(mesh, partition(spec))
        return tuple(
            jax.ShapeDtypeStruct((num_pages, heads, page_size, size), dtype, sharding=sharding)
            for heads, size in spec.cached
        )

    return tuple(pages(spec) for spec in _places(config))


def partition(spec: AttentionSpec | LatentAttentionSpec) -> PartitionSpec:
    """How the arrays of such layers are split over the devices."""
    whole = isinstance(spec, LatentAttentionSpec)
    return PartitionSpec(None, None if whole else LOGICAL_TO_MESH["kv_heads"])


def partitions(config: ModelConfig) -> Any:
    """The PartitionSpecs of all arrays, a KVCache of them."""
    return tuple((partition(spec),) * len(spec.cached) for spec in _places(config))
