"""A linear layer with what stands around it: RMSNorm before, gating or the residual after."""

from pallas_kernels.fused_linear.api import IMPLEMENTATIONS, fused_linear
from pallas_kernels.fused_linear.types import RMSNorm

__all__ = ["IMPLEMENTATIONS", "RMSNorm", "fused_linear"]
