"""Lowering for devices that aren't there."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.add_rms_norm import RMSNorm, add_rms_norm
from tests.helpers.lowering import lowers_for


class Searches:
    """Notes which modules somebody looks for in vain."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, *_: Any) -> None:
        self.names.append(name)


def test_triton_kernels_are_lowered_without_a_search_for_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bfloat16 = jnp.bfloat16
    x = jax.ShapeDtypeStruct((8, 256), bfloat16)
    terms = jax.ShapeDtypeStruct((2, 8, 256), bfloat16)
    norm = RMSNorm(jax.ShapeDtypeStruct((256,), bfloat16), 1e-5)
    assert "add_rms_norm" in lowers_for("cuda", add_rms_norm, x, terms, norm)
    searches = Searches()
    monkeypatch.setattr(sys, "meta_path", [searches, *sys.meta_path])
    jax.clear_caches()
    lowers_for("cuda", add_rms_norm, x, terms, norm)
    assert not [name for name in searches.names if name.startswith("jaxlib")]
