"""MXFP4: values of four bits, 32 of them in a row with a scale of eight (OCP Microscaling Formats
(MX) Specification 1.0, sections 5.3.3, 5.4.1 and 6.3). Read as bfloat16, which holds them exactly.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from converters.lazy import Index, Lazy

BLOCK = 32
"""Values that share a scale."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CODES = np.dtype(np.uint8).name


class Mxfp4(Lazy):
    """A weight [N, ..., K] from its packed values and their scales.

    Args:
        blocks: uint8 [N, ..., K / 32, 16]: two values in a byte, the first in its lower half.
        scales: uint8 [N, ..., K / 32]: powers of two.
    """

    def __init__(self, blocks: Lazy, scales: Lazy) -> None:
        *outer, groups = scales.shape
        if blocks.shape != (*scales.shape, BLOCK // 2):
            raise ValueError(f"blocks {blocks.shape} don't fit scales {scales.shape}")
        super().__init__((*outer, groups * BLOCK), BFLOAT16)
        self.blocks, self.scales = blocks, scales

    def _read(self, box: Index) -> np.ndarray:
        *outer, last = box
        groups = slice(last.start // BLOCK, -(-last.stop // BLOCK))
        blocks = self.blocks.read((*outer, groups, slice(None)))
        scales = self.scales.read((*outer, groups))
        whole = np.empty((*scales.shape[:-1], scales.shape[-1] * BLOCK), BFLOAT16)
        for values, block, scale in zip(whole, blocks, scales):  # what lies between stays small
            codes = scale[..., None].astype(np.uint16) << 8 | block
            values[...] = _pairs()[codes].view(BFLOAT16).reshape(values.shape)
        before = groups.start * BLOCK
        return whole[..., last.start - before : last.stop - before]


@functools.cache
def _pairs() -> np.ndarray:
    """uint32 [65536]: at 256 * scale + byte, the two bfloat16 values side by side."""
    magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # E2M1
    values = np.concatenate([magnitudes, -magnitudes])
    byte = np.arange(256)
    scales = np.ldexp(1.0, byte - 127)  # E8M0
    scales[255] = np.nan
    pairs = scales[:, None, None] * np.stack([values[byte & 15], values[byte >> 4]], -1)
    with np.errstate(over="ignore"):  # of the largest scales
        return pairs.astype(BFLOAT16).view(np.uint32).reshape(-1)
