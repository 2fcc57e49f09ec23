"""Between two halves of a layer: the residual is added, and the sum is normalized."""

from pallas_kernels.add_rms_norm.api import IMPLEMENTATIONS, add_rms_norm
from pallas_kernels.add_rms_norm.types import RMSNorm

__all__ = ["IMPLEMENTATIONS", "RMSNorm", "add_rms_norm"]
