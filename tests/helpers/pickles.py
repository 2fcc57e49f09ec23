"""Writes files as torch.save does, but with any content."""

from __future__ import annotations

import pickle
import zipfile


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write_pickle(
    path, pickled: bytes, members: dict[str, bytes] | None = None, compress=False
) -> None:
    """Writes the zip archive of torch.save around a pickle; members are named below its root."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in (members or {}).items():
            archive.writestr(f"x/{name}", content)


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


def write_tensor(
    path, shape, strides, offset=0, count=4, data=bytes(16), kind="FloatStorage"
) -> None:
    """Writes a file with one tensor "a", however absurd."""
    rebuild = Name("torch._utils._rebuild_tensor_v2")
    value = Call(rebuild, Record(kind, count), offset, shape, strides, False, {})
    with open(path.parent / "pickle", "wb") as file:
        Pickler(file, 2).dump({"a": value})
    write_pickle(path, (path.parent / "pickle").read_bytes(), {"data/0": data})
