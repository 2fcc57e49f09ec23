"""MXFP4 against the format's definition, bit by bit, and against transformers' reader."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from converters.lazy import FromArray
from converters.mxfp4 import Mxfp4
from tests.converters.test_lazy import Counting, indices

SHAPE = (3, 5, 4)
RNG = np.random.default_rng(7)
BLOCKS = RNG.integers(0, 256, (*SHAPE, 16), np.uint8)
SCALES = RNG.integers(0, 255, SHAPE, np.uint8)


def value_of(code: int, scale: int) -> float:
    """A sign, two bits of exponent with bias 1, one of mantissa; without exponent, subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return (-size if sign else size) * 2.0 ** (scale - 127)


def dense(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [..., K]."""
    values = np.empty((*scales.shape, 32))
    for place in np.ndindex(scales.shape):
        for i, byte in enumerate(blocks[place]):
            values[place][2 * i] = value_of(int(byte) & 15, int(scales[place]))
            values[place][2 * i + 1] = value_of(int(byte) >> 4, int(scales[place]))
    return values.reshape(*scales.shape[:-1], -1)


def lazy(blocks: np.ndarray = BLOCKS, scales: np.ndarray = SCALES) -> Mxfp4:
    return Mxfp4(FromArray(blocks), FromArray(scales))


def test_every_code_under_every_scale() -> None:
    """Below the largest exponents bfloat16 holds all of them exactly."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (253, 1, 1))
    scales = np.repeat(np.arange(253, dtype=np.uint8)[:, None], 16, 1)
    got = lazy(blocks, scales).read()
    assert got.dtype.name == "bfloat16"
    np.testing.assert_array_equal(got.astype(np.float64), dense(blocks, scales))


def test_the_last_scale_is_no_number() -> None:
    assert np.isnan(lazy(BLOCKS, np.full(SHAPE, 255, np.uint8)).read().astype(np.float32)).all()


@given(indices((*SHAPE[:-1], SHAPE[-1] * 32)))
def test_any_part_equals_that_part_of_the_whole(index: tuple[slice, ...]) -> None:
    scales = np.minimum(SCALES, 250)
    got = lazy(scales=scales).read(index)
    np.testing.assert_array_equal(got.astype(np.float64), dense(BLOCKS, scales)[index])


def test_a_part_reads_the_blocks_that_it_touches() -> None:
    blocks, scales = Counting(BLOCKS), Counting(SCALES)
    Mxfp4(blocks, scales).read((slice(1, 2), slice(0, 5), slice(31, 65)))
    assert (blocks.count, scales.count) == (5 * 3 * 16, 5 * 3)


def test_blocks_and_scales_must_fit() -> None:
    with pytest.raises(ValueError, match="don't fit scales"):
        lazy(scales=SCALES[:, :, :3])


def test_transformers_reads_the_same() -> None:
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    scales = np.clip(SCALES, 20, 230)
    codes = torch.from_numpy(BLOCKS), torch.from_numpy(scales)
    turned = mxfp4.convert_moe_packed_tensors(*codes, dtype=torch.float32).numpy()
    got = lazy(scales=scales).read().astype(np.float32)
    np.testing.assert_array_equal(got, turned.transpose(0, 2, 1))
