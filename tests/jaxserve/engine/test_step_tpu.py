"""A whole forward step, lowered for a TPU that isn't there: the Mosaic kernels are part of it."""

from __future__ import annotations

import pytest

from jaxserve.engine.batch import Bucket
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from tests.helpers.steps import lowered_steps

NORM = NormSpec("rms", 1e-5)
ATTENTION = AttentionSpec(8, 2, 128, 128**-0.5, RopeSpec(1e4, 128))
LAYER = LayerSpec(ATTENTION, MLPSpec(512, "silu"), NORM)
MODEL = ModelConfig("Tiny", 512, 256, 1024, (LAYER, LAYER), NORM, True, 256, dtype="bfloat16")


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_for_tpus_runs_the_mosaic_kernels(devices: int) -> None:
    decode, mixed = lowered_steps(MODEL, "tpu", [Bucket(8, 8), Bucket(8, 128)], devices)
    for text in (decode, mixed):
        assert "tpu_custom_call" in text
        assert "kv_write" in text
        assert "paged_decode" in text
    assert "paged_prefill" in mixed
    assert "paged_prefill" not in decode
