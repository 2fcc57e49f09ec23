"""Rotation, the write of keys and values, and attention, for steps that only decode."""

from pallas_kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention

__all__ = ["IMPLEMENTATIONS", "decode_attention"]
