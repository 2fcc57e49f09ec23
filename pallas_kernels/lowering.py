"""What the code now being traced will run on."""

from __future__ import annotations

import importlib.util
import sys
import types

import jax

TRITON_DIALECT = "jaxlib.mlir.dialects.tt"

if importlib.util.find_spec(TRITON_DIALECT) is None:
    # For each operation, MLIR's bindings look for their dialect's module until they find one. For
    # Triton's there is none, and a fifth of a program's tracing and lowering went into that search.
    sys.modules[TRITON_DIALECT] = types.ModuleType(TRITON_DIALECT)


def can_lower_triton() -> bool:
    """Whether a Triton kernel can be part of it: on an NVIDIA GPU, or on an abstract one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.platform in ("cuda", "gpu")
    return jax.default_backend() == "gpu"


def multiprocessors() -> int | None:
    """Multiprocessors of the NVIDIA GPU, real or abstract, that code is traced for; None if it is
    for something else."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.num_cores if device.platform in ("cuda", "gpu") else None
    return jax.local_devices()[0].core_count if jax.default_backend() == "gpu" else None


def hopper_cores() -> int:
    """Multiprocessors of the Hopper GPU, real or abstract, that code is traced for.

    Raises:
        NotImplementedError: it is traced for something else.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        hopper = any(name in device.device_kind for name in ("H100", "H200"))
        if device.platform in ("cuda", "gpu") and hopper:
            return device.num_cores
    elif jax.default_backend() == "gpu":
        device = jax.local_devices()[0]
        if device.compute_capability == "9.0":
            return device.core_count
    raise NotImplementedError("the Mosaic GPU kernels need a Hopper GPU")


def can_lower_mosaic_tpu() -> bool:
    """Whether a Mosaic kernel for TPUs can be part of it: on a TPU, or on an abstract one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.platform == "tpu"
    return jax.default_backend() == "tpu"
