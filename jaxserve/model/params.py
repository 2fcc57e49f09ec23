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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Param:
    """One weight.

    Attributes:
        shape: its full shape, before sharding.
        axes: a logical axis name per dimension, or None where it is never split.
        init: "normal" (standard deviation 0.02), "ones" or "zeros", for random weights.
        dtype: its dtype where the model's is too coarse; None takes the model's.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def dtype_in(self, model: jnp.dtype) -> jnp.dtype:
        """Its dtype in a model of that dtype."""
        return jnp.dtype(self.dtype or model)


def prefixed(prefix: str, tree: Mapping[str, Param]) -> dict[str, Param]:
    """The tree with ``prefix/`` before each path."""
    return {f"{prefix}/{path}": param for path, param in tree.items()}


def under(prefix: str, params: Mapping[str, jax.Array]) -> Params:
    """The entries whose paths begin with ``prefix/``, without it."""
    head = prefix + "/"
    return {path[len(head) :]: array for path, array in params.items() if path.startswith(head)}


def abstract(tree: Mapping[str, Param], dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes only, for ``jax.eval_shape`` and lowering."""
    return {
        path: jax.ShapeDtypeStruct(param.shape, param.dtype_in(dtype))
        for path, param in tree.items()
    }


def sharded(
    tree: Mapping[str, Param],
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    specs: Mapping[str, PartitionSpec],
) -> dict[str, jax.ShapeDtypeStruct]:
    """As ``abstract``, with the shardings that ``specs`` give."""
    return {
        path: jax.ShapeDtypeStruct(
            aval.shape, aval.dtype, sharding=NamedSharding(mesh, specs[path])
        )
        for path, aval in abstract(tree, dtype).items()
    }


def partition_specs(
    tree: Mapping[str, Param], rules: Mapping[str, str], mesh_shape: Mapping[str, int]
) -> dict[str, PartitionSpec]:
    """Where each weight's dimensions are split: logical axes translated by the ``rules`` table.

    A dimension whose size its mesh axis doesn't divide stays whole on every device. Of several
    that could be split over one mesh axis, the first is.
    """

    def spec(param: Param) -> PartitionSpec:
        taken: list[str | None] = []
        for name, size in zip(param.axes, param.shape):
            axis = rules.get(name or "")
            fits = axis is not None and axis not in taken and size % mesh_shape[axis] == 0
            taken.append(axis if fits else None)
        return PartitionSpec(*taken)

    return {path: spec(param) for path, param in tree.items()}


def random_params(
    tree: Mapping[str, Param],
    dtype: jnp.dtype,
    mesh: Mesh,
    specs: Mapping[str, PartitionSpec],
    seed: int,
) -> Params:
    """Random weights made on the devices, each shard where it belongs."""

    def make(index: int, param: Param) -> jax.Array:
        own = param.dtype_in(dtype)
        if param.init == "normal":
            key = jax.random.fold_in(jax.random.key(seed), index)
            return (jax.random.normal(key, param.shape, jnp.bfloat16) * 0.02).astype(own)
        return jnp.full(param.shape, 1 if param.init == "ones" else 0, own)

    # One small program per distinct weight shape, instead of one huge one for the model; and one
    # call per weight, since calls wait for the thread that traces the model's programs.
    programs: dict[tuple, jax.stages.Wrapped] = {}
    params: Params = {}
    for index, (path, param) in enumerate(tree.items()):
        sharding = NamedSharding(mesh, specs[path])
        kind = (param, sharding)
        if kind not in programs:
            programs[kind] = jax.jit(make, static_argnums=1, out_shardings=sharding)
        params[path] = programs[kind](index, param)
    return params


def num_bytes(tree: Mapping[str, Param], dtype: jnp.dtype) -> int:
    """Bytes of all weights together, unsharded."""
    return sum(param.size * param.dtype_in(dtype).itemsize for param in tree.values())
