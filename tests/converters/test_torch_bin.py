"""torch.save's files are read as torch reads them, and nothing in them is ever run."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import torch_bin
from jaxserve.errors import CheckpointError


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


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write(path, pickled: bytes, members: dict[str, bytes] | None = None, compress=False) -> None:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in (members or {}).items():
            archive.writestr(f"x/{name}", content)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("attack", "names"),
    [
        (Call(os.system, "touch PWNED"), ["posix.system"]),
        (Call(eval, "open('PWNED', 'w')"), ["builtins.eval", "__builtin__.eval"]),
        (Call(getattr, "x", "upper"), ["builtins.getattr", "__builtin__.getattr"]),
        (Call(torch.load, "x"), ["torch.serialization.load"]),
        (Call(bytearray, 10**12), ["builtins.bytearray", "__builtin__.bytearray"]),
        (Call(np.zeros, 10**12), ["numpy.zeros"]),
    ],
)
def test_malicious_pickles(tmp_path, monkeypatch, attack, names, protocol):
    monkeypatch.chdir(tmp_path)
    for value in (attack, {"a": attack}):
        content = pickle.dumps(value, protocol=protocol)
        write(tmp_path / "x.bin", content)
        with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
            torch_bin.open_file(tmp_path / "x.bin")
        if protocol >= 2:  # older protocols are refused for their operations, before any name
            assert any(name in str(caught.value) for name in names)
        (tmp_path / "x.bin").write_bytes(content)  # in place of the old format
        with pytest.raises(CheckpointError):
            torch_bin.open_file(tmp_path / "x.bin")
    assert not (tmp_path / "PWNED").exists()


OPS = {
    "build on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00asb.",
    "call of a dtype": b"\x80\x02ctorch\nuint16\n)R.",
    "call of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "dict from arguments": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "instance": b"\x80\x02(icollections\nOrderedDict\n.",
    "newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "key that is a tuple": b"\x80\x02}K\x01\x85K\x02s.",
    "append to a dict": b"\x80\x02}K\x01a.",
    "name that is no string": b"\x80\x04K\x01K\x02\x93.",
    "not a storage": b"\x80\x02K\x01Q.",
    "a size below zero": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuJ\xff\xff\xff\xfftQ."
    ),
}
DAMAGED_OPS = {
    "stack underflow": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "no stop": b"\x80\x02}",
    "unknown memo": b"\x80\x02h\x05.",
    "unknown operation": b"\x80\x02\xff.",
    "string longer than the file": b"\x80\x02X\xff\xff\xff\x7fa.",
    "8-byte length": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "empty": b"",
    "nothing on the stack": b"\x80\x02.",
}


@pytest.mark.parametrize("name", OPS)
def test_unusual_operations_are_refused(tmp_path, name):
    write(tmp_path / "x.bin", OPS[name])
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        torch_bin.open_file(tmp_path / "x.bin")


@pytest.mark.parametrize("name", DAMAGED_OPS)
def test_damaged_pickles(tmp_path, name):
    write(tmp_path / "x.bin", DAMAGED_OPS[name])
    with pytest.raises(CheckpointError, match=r"truncated or damaged|not one of a state dict"):
        torch_bin.open_file(tmp_path / "x.bin")


class Record:
    """Pickles as a storage record."""

    def __init__(self, kind: str, count: int):
        self.record = ("storage", Name(f"torch.{kind}"), "0", "cpu", count)


class Name:
    """Pickles as a global."""

    def __init__(self, name: str):
        self.name = name


class Pickler(pickle._Pickler):  # the Python version, whose methods can be replaced
    def persistent_id(self, value):
        return value.record if isinstance(value, Record) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            module, name = value.name.rsplit(".", 1)
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        elif isinstance(value, Call):
            function, args = value.call
            self.save(function)
            self.save(args)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def tensor(path, shape, strides, offset=0, count=4, data=bytes(16), kind="FloatStorage") -> None:
    """Writes a file with one tensor "a", however absurd."""
    rebuild = Name("torch._utils._rebuild_tensor_v2")
    value = Call(rebuild, Record(kind, count), offset, shape, strides, False, {})
    with open(path.parent / "pickle", "wb") as file:
        Pickler(file, 2).dump({"a": value})
    write(path, (path.parent / "pickle").read_bytes(), {"data/0": data})


def test_hand_made_file_loads(tmp_path):
    tensor(tmp_path / "x.bin", (2, 2), (1, 2), data=np.arange(4, dtype=np.float32).tobytes())
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
    tensor(tmp_path / "x.bin", **arguments)
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
    with pytest.raises(CheckpointError, match="not one that torch.save wrote"):
        torch_bin.open_file(path)
    write(path, pickle.dumps({}, 2), {"byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        torch_bin.open_file(path)
    write(path, pickle.dumps({"a": 1}, 2) * 50, compress=True)
    with pytest.raises(CheckpointError, match="compressed"):
        torch_bin.open_file(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(CheckpointError, match="isn't a file that torch.save wrote"):
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


@settings(max_examples=150, deadline=None)
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
