"""Lowers a function for a GPU or TPU that isn't there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import jax
from jax._src.pallas.triton import lowering as triton_lowering
from jax.sharding import AbstractDevice, AbstractMesh

DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
    "tpu": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
}


def on_abstract(platform: str) -> AbstractContextManager[Any]:
    """Lets code be traced for a device of the platform."""
    mesh = AbstractMesh((), (), abstract_device=DEVICES[platform])
    return jax.sharding.use_abstract_mesh(mesh)


def lowers_for(platform: str, function: Callable, *args, **kwargs) -> str:
    """The lowered module's text for ``platform``; raises what the lowering raises, and what a GPU's
    compiler would refuse at once in a Triton kernel."""
    lower_to_triton = triton_lowering.lower_jaxpr_to_triton_module

    def lower_and_verify(*args: Any, **kwargs: Any) -> Any:
        result = lower_to_triton(*args, **kwargs)
        result.module.operation.verify()
        return result

    with (
        on_abstract(platform),
        mock.patch.object(triton_lowering, "lower_jaxpr_to_triton_module", lower_and_verify),
    ):
        traced = jax.jit(function).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=(platform,)).as_text()
