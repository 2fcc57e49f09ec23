"""The device mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxserve.errors import ConfigError

TENSOR = "tensor"
"""The mesh axis of tensor parallelism."""

LOGICAL_TO_MESH: dict[str, str] = dict.fromkeys(
    ("vocab", "kv_heads", "heads", "experts", "ffn"), TENSOR
)


def make_mesh(tensor_parallel_size: int) -> Mesh:
    """A mesh over the first ``tensor_parallel_size`` local devices.

    Raises:
        ConfigError: fewer devices are there.
    """
    devices = jax.local_devices()
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size} needs that many devices, but JAX sees "
            f"{len(devices)} ({devices[0].device_kind}). Lower it, or run `jaxserve doctor`."
        )
    return Mesh(np.array(devices[:tensor_parallel_size]), (TENSOR,))


def make_abstract_mesh(tensor_parallel_size: int) -> AbstractMesh:
    """A mesh for shapes, without devices. Its axis is of the kind that ``Mesh`` has by default;
    from JAX 0.11 on, AbstractMesh has another default."""
    return AbstractMesh((tensor_parallel_size,), (TENSOR,), axis_types=(AxisType.Auto,))


def reduce_sum(x: jax.Array) -> jax.Array:
    """Sums partial results over the tensor-parallel devices; identity with one device."""
    return jax.lax.psum(x, TENSOR) if tensor_parallel_size() > 1 else x


def local_part(whole: jax.Array) -> jax.Array:
    """This device's part of an array [heads, ...] that is split evenly over the devices."""
    size = tensor_parallel_size()
    if size == 1:
        return whole
    count = whole.shape[0] // size
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(TENSOR) * count, count)


def reduce_terms(terms: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Sums terms [S, T, outputs] of a product over the tensor-parallel devices, and adds the bias.

    Returns:
        Terms [S, T, outputs]; just one where there is something to add.
    """
    if tensor_parallel_size() > 1:
        terms = jax.lax.psum(terms.sum(0, keepdims=True), TENSOR)
    return terms if bias is None else terms.sum(0, keepdims=True) + bias


def tensor_parallel_size() -> int:
    """Devices among which the running shard_map splits the model; 1 outside of one."""
    return jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)
