"""Reads safetensors files. The format: https://huggingface.co/docs/safetensors

8 bytes   N, little-endian: length of the header
N bytes   JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
the rest  the tensors' bytes, row-major; offsets count from here, without gaps or overlaps
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.files import map_file, parse_json
from converters.lazy import FromArray, Lazy
from jaxserve.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the official library's limit
MAX_RANK = 32

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


def open_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one file by name; nothing but the header is read yet.

    Raises:
        CheckpointError: the file breaks the format; the message names the file and the tensor.
    """
    data = map_file(path)
    if len(data) < 8:
        raise CheckpointError(f"{path} is truncated: {len(data)} bytes; download it again.")
    length = int.from_bytes(data[:8], "little")
    if length == 0 or length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} isn't a safetensors file: its header would have {length} bytes "
            f"(allowed: 1 to {MAX_HEADER_BYTES})."
        )
    if length > len(data) - 8:
        raise CheckpointError(
            f"{path} is truncated: its header has {length} bytes, the file {len(data)}; "
            "download it again."
        )
    header = parse_json(bytes(data[8 : 8 + length]), f"{path}: the header")
    header.pop("__metadata__", None)
    body = data[8 + length :]
    entries = {name: _Entry(f"{path}: tensor {name!r}", entry) for name, entry in header.items()}
    _check_offsets(path, entries, len(body))
    return {name: FromArray(entry.view(body)) for name, entry in entries.items()}


class _Entry:
    """A header entry, checked on its own.

    Attributes:
        where: file and tensor, for messages.
        dtype, shape, begin, end: as in the header.
    """

    def __init__(self, where: str, entry: Any) -> None:
        self.where = where
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}: expected dtype, shape and data_offsets.")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{where}: unknown dtype {str(entry['dtype'])[:40]!r}; known are "
                f"{', '.join(DTYPES)}."
            )
        self.dtype = DTYPES[entry["dtype"]]
        self.shape = self._naturals(entry["shape"], "shape")
        offsets = self._naturals(entry["data_offsets"], "data_offsets")
        if len(self.shape) > MAX_RANK or len(offsets) != 2:
            raise CheckpointError(
                f"{where}: shape must have at most {MAX_RANK} sizes and data_offsets two numbers."
            )
        self.begin, self.end = offsets
        # Python's integers don't overflow, so a product that wraps around in 64 bits is caught.
        needed = math.prod(self.shape) * self.dtype.itemsize
        if self.end - self.begin != needed:
            raise CheckpointError(
                f"{where}: data_offsets {[self.begin, self.end]} span {self.end - self.begin} "
                f"bytes, but dtype and shape {list(self.shape)} need {needed}."
            )

    def _naturals(self, value: Any, key: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise CheckpointError(f"{self.where}: {key} must be a list of non-negative integers.")
        return tuple(value)

    def view(self, body: memoryview) -> np.ndarray:
        """The tensor as a read-only view of the mapped file."""
        return np.frombuffer(body[self.begin : self.end], self.dtype).reshape(self.shape)


def _check_offsets(path: Path, entries: dict[str, _Entry], size: int) -> None:
    """Tensors must fill the data exactly: no gap, no overlap, nothing after the end."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.end > size:
            raise CheckpointError(
                f"{entry.where} ends at byte {entry.end} of {size}: the file is truncated or "
                "damaged; download it again."
            )
        if entry.begin != end:
            fault = "overlaps the tensor before it" if entry.begin < end else "leaves a gap"
            raise CheckpointError(f"{entry.where}: data_offsets {fault}; the file is damaged.")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor; it is damaged.")
