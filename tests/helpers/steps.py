"""Lowers a model's steps for a device that isn't there."""

from __future__ import annotations

import types
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxserve.distributed import LOGICAL_TO_MESH, TENSOR
from jaxserve.engine import lowered
from jaxserve.engine.batch import Bucket, Layout
from jaxserve.engine.step import StepPrograms
from jaxserve.model import decoder
from jaxserve.model import params as model_params
from jaxserve.model.config import ModelConfig
from tests.helpers.lowering import DEVICES


def lowered_steps(
    model: ModelConfig, platform: str, buckets: list[Bucket], devices: int = 1
) -> list[str]:
    """The text of each bucket's ``forward``, lowered for as many devices of the platform."""

    def jit(function, **settings):
        # The step's own ``jax.jit`` lowers for its devices; without any, it must be told for what.
        jitted = jax.jit(function, **settings)
        lower = lambda *args: jitted.trace(*args).lower(lowering_platforms=(platform,))  # noqa: E731
        return types.SimpleNamespace(lower=lower)

    auto = (AxisType.Auto,)
    mesh = AbstractMesh((devices,), (TENSOR,), auto, abstract_device=DEVICES[platform])
    model = decoder.for_tensor_parallel(model, devices)
    tree = decoder.declare(model)
    specs = model_params.partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    weights = model_params.sharded(tree, jnp.dtype(model.dtype), mesh, specs)
    layouts = {bucket: Layout.make(bucket, 16, 8, 4, split=True) for bucket in buckets}
    told = types.SimpleNamespace(**vars(jax) | {"jit": jit})
    with mock.patch.object(lowered, "jax", told), jax.sharding.use_abstract_mesh(mesh):
        programs = StepPrograms(model, weights, mesh, layouts, num_pages=100, max_pages=64)
        lowerings = programs.lowerings()
        return [lowerings["forward", bucket]().as_text() for bucket in buckets]
