"""A whole forward step, lowered for a TPU that isn't there: the Mosaic kernels are part of it."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxserve.distributed import LOGICAL_TO_MESH, TENSOR
from jaxserve.engine import lowered
from jaxserve.engine.batch import Bucket, Layout
from jaxserve.engine.step import StepPrograms
from jaxserve.model import decoder
from jaxserve.model import params as model_params
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from tests.helpers.lowering import DEVICES

NORM = NormSpec("rms", 1e-5)
ATTENTION = AttentionSpec(8, 2, 128, 128**-0.5, RopeSpec(1e4, 128))
LAYER = LayerSpec(ATTENTION, MLPSpec(512, "silu"), NORM)
MODEL = ModelConfig("Tiny", 512, 256, 1024, (LAYER, LAYER), NORM, True, 256, dtype="bfloat16")
BUCKETS = {"decode": Bucket(8, 8), "mixed": Bucket(8, 128)}


@pytest.fixture(autouse=True)
def lowers_for_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's own ``jax.jit`` lowers for its devices; without any, it must be told for what."""

    def jit(function, **settings):
        jitted = jax.jit(function, **settings)
        lower = lambda *args: jitted.trace(*args).lower(lowering_platforms=("tpu",))  # noqa: E731
        return types.SimpleNamespace(lower=lower)

    monkeypatch.setattr(lowered, "jax", types.SimpleNamespace(**vars(jax) | {"jit": jit}))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_for_tpus_runs_the_mosaic_kernels(devices: int) -> None:
    auto = (AxisType.Auto,)
    mesh = AbstractMesh((devices,), (TENSOR,), auto, abstract_device=DEVICES["tpu"])
    model = decoder.for_tensor_parallel(MODEL, devices)
    tree = decoder.declare(model)
    specs = model_params.partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    weights = model_params.sharded(tree, jnp.dtype("bfloat16"), mesh, specs)
    layouts = {bucket: Layout.make(bucket, 16, 8, 4, split=True) for bucket in BUCKETS.values()}
    programs = StepPrograms(model, weights, mesh, layouts, num_pages=100, max_pages=64)
    lowerings = programs.lowerings()
    texts = {}
    with jax.sharding.use_abstract_mesh(mesh):
        for name, bucket in BUCKETS.items():
            texts[name] = lowerings["forward", bucket]().as_text()
    for text in texts.values():
        assert "tpu_custom_call" in text
        assert "kv_write" in text
        assert "paged_decode" in text
    assert "paged_prefill" in texts["mixed"]
    assert "paged_prefill" not in texts["decode"]
