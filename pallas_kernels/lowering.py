"""What the code now being traced will run on."""

from __future__ import annotations

import jax


def can_lower_triton() -> bool:
    """Whether a Triton kernel can be part of it: on an NVIDIA GPU, or on an abstract one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.platform in ("cuda", "gpu")
    return jax.default_backend() == "gpu"
