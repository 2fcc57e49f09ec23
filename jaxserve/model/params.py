"""Param: each weight's shape, logical axes and initializer, declared once.

The abstract tree, the shardings, random weights and the load targets all derive from the
declaration that ``decoder.declare`` makes. A tree is a flat dict from paths such as
``"layers/0/attention/qkv"`` to Params, and its arrays are a flat dict with the same paths: a plain
dict is a pytree that JAX flattens in C++.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Param:
    """One weight.

    Attributes:
        shape: its full shape, before sharding.
        axes: a logical axis name per dimension, or None where it is never split.
        init: "normal" (standard deviation 0.02), "ones" or "zeros", for random weights.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def prefixed(prefix: str, tree: Mapping[str, Param]) -> dict[str, Param]:
    """The tree with ``prefix/`` before each path."""
    return {f"{prefix}/{path}": param for path, param in tree.items()}


def under(prefix: str, params: Mapping[str, jax.Array]) -> Params:
    """The entries whose paths begin with ``prefix/``, without it."""
    head = prefix + "/"
    return {path[len(head) :]: array for path, array in params.items() if path.startswith(head)}


def abstract(tree: Mapping[str, Param], dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes only, for ``jax.eval_shape`` and lowering."""
    return {path: jax.ShapeDtypeStruct(param.shape, dtype) for path, param in tree.items()}


def partition_specs(
    tree: Mapping[str, Param], rules: Mapping[str, str], mesh_shape: Mapping[str, int]
) -> dict[str, PartitionSpec]:
    """Where each weight's dimensions are split: logical axes translated by the ``rules`` table.

    A dimension whose size its mesh axis doesn't divide stays whole on every device.
    """

    def spec(param: Param) -> PartitionSpec:
        mesh_axes = [rules.get(axis or "") for axis in param.axes]
        fits = [
            axis if axis is not None and size % mesh_shape[axis] == 0 else None
            for axis, size in zip(mesh_axes, param.shape)
        ]
        return PartitionSpec(*fits)

    return {path: spec(param) for path, param in tree.items()}


def random_params(
    tree: Mapping[str, Param],
    dtype: jnp.dtype,
    mesh: Mesh,
    specs: Mapping[str, PartitionSpec],
    seed: int,
) -> Params:
    """Random weights made on the devices, each shard where it belongs."""

    def make(key: jax.Array, param: Param) -> jax.Array:
        if param.init == "normal":
            return (jax.random.normal(key, param.shape, jnp.bfloat16) * 0.02).astype(dtype)
        return jnp.full(param.shape, 1 if param.init == "ones" else 0, dtype)

    # One small program per distinct weight shape, instead of one huge one for the model.
    programs: dict[tuple, jax.stages.Wrapped] = {}
    params: Params = {}
    for index, (path, param) in enumerate(tree.items()):
        sharding = NamedSharding(mesh, specs[path])
        kind = (param, sharding)
        if kind not in programs:
            programs[kind] = jax.jit(make, static_argnums=1, out_shardings=sharding)
        params[path] = programs[kind](jax.random.fold_in(jax.random.key(seed), index), param)
    return params


def num_bytes(tree: Mapping[str, Param], dtype: jnp.dtype) -> int:
    """Bytes of all weights together, unsharded."""
    return sum(param.size for param in tree.values()) * np.dtype(dtype).itemsize
