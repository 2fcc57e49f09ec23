"""What the code now being traced will run on."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import jax

TRITON_DIALECT = "jaxlib.mlir.dialects.tt"

if importlib.util.find_spec(TRITON_DIALECT) is None:
    # For each operation, MLIR's bindings look for their dialect's module until they find one. For
    # Triton's there is none, and a fifth of a program's tracing and lowering went into that search.
    sys.modules[TRITON_DIALECT] = types.ModuleType(TRITON_DIALECT)


def can_lower_triton() -> bool:
    """Whether a Triton kernel can be part of it: on an NVIDIA GPU, or on an abstract one."""
    device = abstract_device()
    if device is not None:
        return device.platform in ("cuda", "gpu")
    return jax.default_backend() == "gpu"


def multiprocessors() -> int | None:
    """Multiprocessors of the NVIDIA GPU, real or abstract, that code is traced for; None if it is
    for something else."""
    if not can_lower_triton():
        return None
    device = abstract_device()
    return device.num_cores if device is not None else jax.local_devices()[0].core_count


def hopper_cores() -> int:
    """Multiprocessors of the Hopper GPU, real or abstract, that code is traced for.

    Raises:
        NotImplementedError: it is traced for something else.
    """
    cores, device = multiprocessors(), abstract_device()
    if cores is not None:
        if device is not None:
            hopper = any(name in device.device_kind for name in ("H100", "H200"))
        else:
            hopper = jax.local_devices()[0].compute_capability == "9.0"
        if hopper:
            return cores
    raise NotImplementedError("the Mosaic GPU kernels need a Hopper GPU")


def can_lower_mosaic_tpu() -> bool:
    """Whether a Mosaic kernel for TPUs can be part of it: on a TPU, or on an abstract one."""
    device = abstract_device()
    if device is not None:
        return device.platform == "tpu"
    return jax.default_backend() == "tpu"


def abstract_device() -> Any:
    """The device that isn't there, if code is traced for one; None for a real one."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
