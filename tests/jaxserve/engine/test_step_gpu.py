"""Whole forward steps, lowered for an NVIDIA GPU that isn't there: their kernels."""

from __future__ import annotations

import dataclasses

from jaxserve.engine.batch import Bucket
from jaxserve.model.config import MoESpec, RouterSpec
from tests.helpers.steps import lowered_steps
from tests.jaxserve.engine.test_step_tpu import LAYER, MODEL

ONE, EIGHT, MIXED = Bucket(1, 1), Bucket(8, 8), Bucket(8, 128)


def test_a_layer_of_one_token_is_one_kernel() -> None:
    one, eight, mixed = lowered_steps(MODEL, "cuda", [ONE, EIGHT, MIXED])
    assert "decode_layer" in one
    parts = "add_rms_norm", "decode_attention", "rope_kv_write", "paged_decode"
    assert not any(name in one for name in parts)
    for text in (eight, mixed):  # with split products
        assert "decode_layer" not in text and "decode_attention" not in text
        assert "add_rms_norm" in text and "rope_kv_write" in text and "paged_decode" in text


def test_so_is_one_with_experts() -> None:
    ffn = MoESpec(16, 256, RouterSpec(2, normalize=True))
    layers = (dataclasses.replace(LAYER, ffn=ffn),) * 2
    one, _ = lowered_steps(dataclasses.replace(MODEL, layers=layers), "cuda", [ONE, MIXED])
    assert "decode_layer" in one
    assert "expert_ffn" not in one and "route_experts" not in one


def test_float32_and_other_layers_go_through_their_halves() -> None:
    ungated = dataclasses.replace(LAYER, ffn=dataclasses.replace(LAYER.ffn, gated=False))
    for changes in ({"dtype": "float32"}, {"layers": (LAYER, ungated)}):
        text, _ = lowered_steps(dataclasses.replace(MODEL, **changes), "cuda", [ONE, MIXED])
        assert "decode_layer" not in text and "add_rms_norm" in text
