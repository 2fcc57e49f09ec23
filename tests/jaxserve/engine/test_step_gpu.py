"""Whole forward steps, lowered for an NVIDIA GPU that isn't there: their kernels."""

from __future__ import annotations

import dataclasses

from jaxserve.engine.batch import Bucket
from tests.helpers.steps import lowered_steps
from tests.jaxserve.engine.test_step_tpu import LAYER, MODEL

ONE, EIGHT, MIXED = Bucket(1, 1), Bucket(8, 8), Bucket(8, 128)


def test_the_products_of_one_token_are_one_kernel() -> None:
    one, eight, mixed = lowered_steps(MODEL, "cuda", [ONE, EIGHT, MIXED])
    assert "decode_chain" in one and "add_rms_norm" not in one
    for text in (eight, mixed):
        assert "decode_chain" not in text and "add_rms_norm" in text


def test_one_token_rotates_and_attends_in_one_kernel() -> None:
    one, eight, mixed = lowered_steps(MODEL, "cuda", [ONE, EIGHT, MIXED])
    assert "decode_attention" in one
    assert "rope_kv_write" not in one and "paged_decode" not in one
    for text in (eight, mixed):  # with split products
        assert "decode_attention" not in text
        assert "rope_kv_write" in text and "paged_decode" in text


def test_float32_and_other_layers_go_through_their_halves() -> None:
    ungated = dataclasses.replace(LAYER, ffn=dataclasses.replace(LAYER.ffn, gated=False))
    for changes in ({"dtype": "float32"}, {"layers": (LAYER, ungated)}):
        text, _ = lowered_steps(dataclasses.replace(MODEL, **changes), "cuda", [ONE, MIXED])
        assert "decode_chain" not in text and "add_rms_norm" in text
