"""Min-p, top-k and top-p without sorting: the logit from which on a lane's tokens are kept."""

from pallas_kernels.truncation_threshold.api import IMPLEMENTATIONS, truncation_threshold

__all__ = ["IMPLEMENTATIONS", "truncation_threshold"]
