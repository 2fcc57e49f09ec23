"""Norms against torch's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxserve.model import norms
from jaxserve.model.config import NormSpec


def weights(kind: str, size: int, dtype: str) -> dict[str, jnp.ndarray]:
    rng = np.random.default_rng(1)
    spec = NormSpec(kind, 1e-5)
    return {
        name: jnp.asarray(rng.standard_normal(param.shape), dtype)
        for name, param in norms.declare(spec, size).items()
    }


def as_torch(x: jnp.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_norms_are_torchs(kind: str, dtype: str, scale: float) -> None:
    """Computed in float32 whatever the dtype, so 16 bits lose no more than the rounding."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 3, 64)) * scale + scale, dtype)
    params = weights(kind, 64, dtype)
    out = norms.apply(NormSpec(kind, 1e-5), params, x)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    if kind == "rms":
        want = torch.nn.functional.rms_norm(as_torch(x), (64,), as_torch(params["scale"]), 1e-5)
    else:
        want = torch.nn.functional.layer_norm(
            as_torch(x), (64,), as_torch(params["scale"]), as_torch(params["bias"]), 1e-5
        )
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    np.testing.assert_allclose(
        np.asarray(out, np.float32), want, atol=tolerance * float(want.abs().max())
    )


def test_large_16_bit_values_do_not_overflow() -> None:
    x = jnp.full((1, 8), 60000.0, jnp.float16)
    out = norms.apply(NormSpec("rms", 1e-5), {"scale": jnp.ones(8, jnp.float16)}, x)
    np.testing.assert_allclose(out, 1.0, atol=1e-3)


def test_zeros_stay_zeros() -> None:
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    for kind in ("rms", "layer"):
        assert not norms.apply(NormSpec(kind, 1e-6), params, jnp.zeros((2, 8))).any()
