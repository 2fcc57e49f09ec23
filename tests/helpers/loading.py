"""Loads checkpoints for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from converters import Checkpoint, Progress, open_checkpoint
from jaxserve import distributed
from jaxserve.model import decoder, params
from jaxserve.model.params import Params


def load(
    checkpoint: Checkpoint | Path,
    tensor_parallel_size: int = 1,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
) -> Params:
    """The checkpoint's weights on a mesh of so many devices, split as the engine splits them."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    mesh = distributed.make_mesh(tensor_parallel_size)
    tree = decoder.declare(decoder.for_tensor_parallel(checkpoint.config, tensor_parallel_size))
    specs = params.partition_specs(tree, distributed.LOGICAL_TO_MESH, dict(mesh.shape))
    return checkpoint.load(tree, specs, mesh, dtype, progress)
