"""A matrix product with what stands around it: gating after it, or its sum left unfinished."""

from pallas_kernels.fused_linear.api import IMPLEMENTATIONS, fused_linear

__all__ = ["IMPLEMENTATIONS", "fused_linear"]
