"""A layer of a step of one token, from its queries, keys and values to the next one's."""

from pallas_kernels.decode_layer.api import IMPLEMENTATIONS, decode_layer
from pallas_kernels.decode_layer.types import Experts, GatedMLP, LayerWeights

__all__ = ["IMPLEMENTATIONS", "Experts", "GatedMLP", "LayerWeights", "decode_layer"]
