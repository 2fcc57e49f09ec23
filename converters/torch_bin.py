"""Reads the tensors of PyTorch's ``.bin`` files without PyTorch and without running pickled code.

``torch.save`` writes a zip archive with stored (uncompressed) members, see torch/serialization.py:

    <root>/data.pkl    a pickle of the state dict, which refers to storages by key
    <root>/data/<key>  the bytes of one storage
    <root>/byteorder   "little" or "big" (newer files)

Before PyTorch 1.6 it wrote five pickles and then the storages, each a count and its bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from converters import torch_pickle
from converters.files import map_file
from converters.lazy import Lazy
from converters.torch_pickle import Tensor
from jaxserve.errors import CheckpointError

MAX_PICKLE_BYTES = 100_000_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class StridedTensor(Lazy):
    """A strided view of a storage's bytes."""

    def __init__(self, tensor: Tensor, data: memoryview) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor, self.data = tensor, data

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.tensor.strides]
        view = np.ndarray(self.shape, self.dtype, self.data, self.tensor.offset * size, strides)
        return view[box]


def open_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one file by name; nothing but their list is read yet.

    Raises:
        CheckpointError: the file is damaged, or its pickle wants more than tensors.
    """
    data = map_file(path)
    if bytes(data[:4]) == b"PK\x03\x04":
        tensors, find = _open_zip(path, data)
    else:
        tensors, find = _open_legacy(path, data)
    return {name: StridedTensor(tensor, find(name, tensor)) for name, tensor in tensors.items()}


Find = Callable[[str, Tensor], memoryview]


def _open_zip(path: Path, data: memoryview) -> tuple[dict[str, Tensor], Find]:
    """The tensors of a zip archive, and the function that finds a tensor's storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); download it again."
        ) from None
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote.")
    root = roots[0]

    def member(name: str) -> memoryview | None:
        info = members.get(f"{root}/{name}")
        return None if info is None else _stored_bytes(path, data, info)

    order = member("byteorder")
    if order is not None and bytes(order) != b"little":
        raise CheckpointError(f"{path} has big-endian data; save it on a little-endian machine.")
    pickled = member("data.pkl")
    assert pickled is not None
    if len(pickled) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: data.pkl has {len(pickled)} bytes; that is no list of tensors."
        )
    tensors = _named_tensors(path, torch_pickle.load(io.BytesIO(pickled), str(path)))

    def find(name: str, tensor: Tensor) -> memoryview:
        found = member(f"data/{tensor.storage.key}")
        if found is None:
            raise CheckpointError(
                f"{path}: the data of tensor {name!r} are missing; download the file again."
            )
        return _checked(path, name, tensor, found)

    return tensors, find


def _stored_bytes(path: Path, data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed zip member, found through its local header (APPNOTE 4.3.7)."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(
            f"{path}: member {info.filename!r} is compressed or encrypted, which torch.save never "
            "does; save the file again."
        )
    header = info.header_offset
    if bytes(data[header : header + 4]) != b"PK\x03\x04" or header + 30 > len(data):
        raise CheckpointError(
            f"{path}: member {info.filename!r} is damaged; download the file again."
        )
    names = int.from_bytes(data[header + 26 : header + 28], "little")
    extra = int.from_bytes(data[header + 28 : header + 30], "little")
    begin = header + 30 + names + extra
    if begin + info.file_size > len(data):
        raise CheckpointError(f"{path}: member {info.filename!r} is truncated; download it again.")
    return data[begin : begin + info.file_size]


def _open_legacy(path: Path, data: memoryview) -> tuple[dict[str, Tensor], Find]:
    """The same for the format before PyTorch 1.6."""
    file = io.BytesIO(data[:MAX_PICKLE_BYTES])
    where = str(path)
    try:
        magic = torch_pickle.load(file, where)
    except CheckpointError as error:
        raise CheckpointError(f"{path} isn't a file that torch.save wrote ({error}).") from None
    if magic != LEGACY_MAGIC:
        raise CheckpointError(f"{path} isn't a file that torch.save wrote.")
    _version, system, state, keys = (torch_pickle.load(file, where) for _ in range(4))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} has big-endian data; save it on a little-endian machine.")
    tensors = _named_tensors(path, state)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    places: dict[str, memoryview] = {}
    position = file.tell()
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        if not isinstance(key, str) or key not in storages or count < 0:
            raise CheckpointError(f"{path}: its list of storages is damaged; download it again.")
        end = position + 8 + count * storages[key].dtype.itemsize
        places[key] = data[position + 8 : end]
        position = end

    def find(name: str, tensor: Tensor) -> memoryview:
        return _checked(path, name, tensor, places.get(tensor.storage.key, memoryview(b"")))

    return tensors, find


def _named_tensors(path: Path, state: Any) -> dict[str, Tensor]:
    """Checks that a file holds a flat dict of tensors."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of tensors.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: entry {str(name)[:80]!r} is no tensor; expected a plain state dict, as "
                "torch.save(model.state_dict(), ...) writes it."
            )
    return state


def _checked(path: Path, name: str, tensor: Tensor, data: memoryview) -> memoryview:
    """The storage's bytes, once the tensor is known to lie inside of them."""
    where = f"{path}: tensor {name!r}"
    declared = tensor.storage.num_bytes
    if len(data) < declared:
        raise CheckpointError(f"{where} is truncated: {len(data)} of {declared} bytes.")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides))
    if 0 not in tensor.shape and (last + 1) * tensor.dtype.itemsize > declared:
        raise CheckpointError(f"{where} reaches beyond its storage of {declared} bytes.")
    return data[:declared]
