"""torch.save's files are read as torch reads them, and nothing in them is ever run."""

from __future__ import annotations

import collections
import contextlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import torch_bin
from jaxserve.errors import CheckpointError
from tests.helpers.pickles import write_pickle, write_tensor


def as_bytes(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check(path, tensors: dict[str, torch.Tensor]) -> None:
    got = torch_bin.open_file(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = got[name].read()
        assert array.shape == tuple(tensor.shape), name
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == as_bytes(tensor), name
        if tensor.ndim == 2 and tensor.numel():
            part = got[name].read((slice(1, 2), slice(0, 2)))
            assert part.tobytes() == as_bytes(tensor[1:2, 0:2])


def samples(types: str) -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "plain": base,
        "shared": base[2:],
        "transposed": base.t(),
        "strided": base[1:, ::2],
        "expanded": base[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(base * 2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
    }
    return tensors | {name: base.to(getattr(torch, name)) for name in types.split()}


OLD_TYPES = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool"


def test_zip_format(tmp_path):
    tensors = samples(OLD_TYPES + " float8_e4m3fn float8_e5m2 uint16")
    torch.save(tensors, tmp_path / "x.bin")
    check(tmp_path / "x.bin", tensors)


def test_format_before_torch_1_6(tmp_path):
    tensors = samples(OLD_TYPES)
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    check(tmp_path / "x.bin", tensors)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_state_dict_of_a_module(tmp_path, zipped, protocol):
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    assert isinstance(state, collections.OrderedDict)
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    torch.save(state, tmp_path / "x.bin", **options)
    check(tmp_path / "x.bin", dict(state))


def test_hand_made_file_loads(tmp_path):
    write_tensor(tmp_path / "x.bin", (2, 2), (1, 2), data=np.arange(4, dtype=np.float32).tobytes())
    array = torch_bin.open_file(tmp_path / "x.bin")["a"].read()
    np.testing.assert_array_equal(array, [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (5,), "strides": (1,)}, "beyond its storage of 16 bytes"),
        ({"shape": (2,), "strides": (4,)}, "beyond its storage"),
        ({"shape": (4,), "strides": (1,), "offset": 1}, "beyond its storage"),
        ({"shape": (1,), "strides": (1,), "offset": 2**40}, "beyond its storage"),
        ({"shape": (4,), "strides": (1,), "data": bytes(15)}, "truncated: 15 of 16 bytes"),
        ({"shape": (4,), "strides": (1,), "count": 2**62}, "truncated: 16 of"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "absurd shape"),
        ({"shape": (4,), "strides": (-1,)}, "non-negative"),
        ({"shape": (4,), "strides": ()}, "don't fit"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "don't fit"),
        ({"shape": ("4",), "strides": (1,)}, "non-negative"),
        ({"shape": 4, "strides": (1,)}, "non-negative"),
        (
            {"shape": (4,), "strides": (1,), "kind": "ComplexFloatStorage"},
            "torch.ComplexFloatStorage",
        ),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, arguments, message):
    write_tensor(tmp_path / "x.bin", **arguments)
    with pytest.raises(CheckpointError, match=message):
        torch_bin.open_file(tmp_path / "x.bin")


def test_other_contents_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"model": {"a": torch.zeros(2)}}, path)
    with pytest.raises(CheckpointError, match="entry 'model' is no tensor"):
        torch_bin.open_file(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        torch_bin.open_file(path)
    torch.save({"a": torch.zeros(2).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="_rebuild_sparse_tensor"):
        torch_bin.open_file(path)
    torch.save({"a": torch.tensor([1 + 2j])}, path)
    with pytest.raises(CheckpointError, match="ComplexFloatStorage"):
        torch_bin.open_file(path)


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="zip archive, but not one"):
        torch_bin.open_file(path)
    write_pickle(path, pickle.dumps({}, 2), {"byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        torch_bin.open_file(path)
    write_pickle(path, pickle.dumps({"a": 1}, 2) * 50, compress=True)
    with pytest.raises(CheckpointError, match="compressed"):
        torch_bin.open_file(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(CheckpointError, match=r"isn't a file that torch\.save wrote"):
        torch_bin.open_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path, zipped):
    path = tmp_path / "x.bin"
    tensors = {"a": torch.arange(300.0), "b": torch.arange(300.0)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            torch_bin.open_file(path)


@settings(max_examples=150)
@given(st.data(), st.booleans())
def test_mutations_load_or_are_refused(tmp_path_factory, data, zipped):
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    torch.save(
        {"a": torch.arange(6.0), "b": torch.arange(6.0).half()},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):
        for lazy in torch_bin.open_file(path).values():
            if lazy.nbytes < 10**6:
                lazy.read()
