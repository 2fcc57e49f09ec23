"""No pickle runs anything: every name and operation that a state dict lacks is refused."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from converters import torch_bin
from jaxserve.errors import CheckpointError
from tests.helpers.pickles import Call, write_pickle


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
        write_pickle(tmp_path / "x.bin", content)
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
    write_pickle(tmp_path / "x.bin", OPS[name])
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        torch_bin.open_file(tmp_path / "x.bin")


@pytest.mark.parametrize("name", DAMAGED_OPS)
def test_damaged_pickles(tmp_path, name):
    write_pickle(tmp_path / "x.bin", DAMAGED_OPS[name])
    with pytest.raises(CheckpointError, match=r"truncated or damaged|not one of a state dict"):
        torch_bin.open_file(tmp_path / "x.bin")
