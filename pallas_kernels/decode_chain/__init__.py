"""All products between two attentions of a single token, as one kernel."""

from pallas_kernels.decode_chain.api import IMPLEMENTATIONS, decode_chain
from pallas_kernels.decode_chain.types import ChainWeights

__all__ = ["IMPLEMENTATIONS", "ChainWeights", "decode_chain"]
