"""Lowers a function for a GPU or TPU that isn't there."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh

DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
    "tpu": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
}


def lowers_for(platform: str, function: Callable, *args, **kwargs) -> str:
    """The lowered module's text for ``platform``; raises what the lowering raises."""
    mesh = AbstractMesh((), (), abstract_device=DEVICES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=(platform,)).as_text()
