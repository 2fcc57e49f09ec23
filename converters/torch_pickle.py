"""An interpreter of the few pickle operations that a PyTorch state dict consists of.

Python's own unpickler calls whatever a file names. This one has no imports and no calls: the names
that may appear are the keys of ``_GLOBALS``, each stands for an inert function below, and anything
else is refused by name. The operations are those of pickle protocol 2, see Lib/pickletools.py.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError

MAX_RANK = 32
MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class Storage:
    """A run of bytes that tensors view. ``dtype`` is uint8 where the storage has no type."""

    key: str
    dtype: np.dtype
    num_bytes: int


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


class _Refused(Exception):
    """The pickle does what a state dict never does."""


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise _Refused(f"{what} isn't a tuple of non-negative integers")
    return value


def _tensor(storage: Any, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
    shape, strides = _naturals(shape, "a shape"), _naturals(strides, "a stride")
    (offset,) = _naturals((offset,), "an offset")
    if len(shape) > MAX_RANK or len(shape) != len(strides):
        raise _Refused("a tensor's shape and strides don't fit")
    if max(offset, math.prod(shape), *strides, 0) > MAX_ELEMENTS:
        raise _Refused(f"a tensor has the absurd shape {shape[:4]}")
    return Tensor(storage, dtype, offset, shape, strides)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """rest: requires_grad, backward_hooks and, sometimes, {"conj": True} or the like."""
    if not isinstance(storage, Storage) or len(rest) > 3 or (len(rest) == 3 and rest[2]):
        raise _Refused("a tensor isn't plain")
    return _tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> Tensor:
    """For dtypes without a storage type of their own, such as float8."""
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype) or any(rest):
        raise _Refused("a tensor isn't plain")
    return _tensor(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: Any, *_rest: Any) -> Any:
    if not isinstance(data, Tensor):
        raise _Refused("a parameter isn't a tensor")
    return data


def _ordered_dict(*args: Any) -> dict:
    if args:
        raise _Refused("an OrderedDict is made from arguments")
    return {}


def _size(shape: Any) -> tuple:
    return _naturals(shape, "a shape")


_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
_CALLABLE = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
}
_GLOBALS: dict[str, Any] = (
    _CALLABLE
    | {f"torch.{name}": _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()}
    | {f"torch.{name}": np.dtype(dtype) for name, dtype in _DTYPES.items()}
    | {"torch.storage.UntypedStorage": _StorageType(np.dtype(np.uint8))}
)


def load(file: BinaryIO, where: str) -> Any:
    """Interprets one pickle and leaves ``file`` behind its end.

    Returns:
        None, bool, int, float, str, tuple, list, dict and Tensor, nested.

    Raises:
        CheckpointError: the pickle is damaged or wants anything else; the message begins with
            ``where`` and names the unexpected global.
    """
    machine = _Machine()
    try:
        for opcode, argument, _position in pickletools.genops(file):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except _Refused as error:
        raise CheckpointError(
            f"{where}: {error}. Weights have no use for that, so the file was refused and nothing "
            "in it was run; use a safetensors checkpoint from a source you trust."
        ) from None
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: its pickle is truncated or damaged ({str(error)[:100]}); download it again."
        ) from None


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_PUSH = frozenset((*_NUMBERS, "BINUNICODE", "SHORT_BINUNICODE"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORE = frozenset(("BINPUT", "LONG_BINPUT"))
_FETCH = frozenset(("BINGET", "LONG_BINGET"))


class _Machine:
    """The pickle machine: a stack, the marks in it, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Runs one operation."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _STORE:
            self.memo[argument] = self.stack[-1]
        elif name in _FETCH:
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self._global(argument.replace(" ", ".", 1)))
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _TUPLES:
            self.stack[-_TUPLES[name] :] = [self._last(_TUPLES[name])]
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        else:
            handler = getattr(self, f"_do_{name.lower()}", None)
            if handler is None:
                raise _Refused(f"the pickle operation {name} is not one of a state dict")
            handler()

    def _last(self, count: int) -> tuple:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("stack underflow")
        return tuple(self.stack[-count:])

    def _pop_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    @staticmethod
    def _global(name: str) -> Any:
        if name not in _GLOBALS:
            raise _Refused(f"it wants the global {name[:100]!r}")
        return _GLOBALS[name]

    def _do_stack_global(self) -> None:
        module, name = self._last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Refused("it wants a global whose name is no string")
        self.stack[-2:] = [self._global(f"{module}.{name}")]

    def _do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_empty_dict(self) -> None:
        self.stack.append({})

    def _do_empty_list(self) -> None:
        self.stack.append([])

    def _do_tuple(self) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _do_setitem(self) -> None:
        self._update(list(self._last(2)), pop=2)

    def _do_setitems(self) -> None:
        self._update(self._pop_mark(), pop=0)

    def _update(self, items: list[Any], pop: int) -> None:
        if pop:
            del self.stack[-pop:]
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise _Refused("it sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str | int):  # hashing a deep tuple can take for ever
                raise _Refused("it has a dict key that is no string")
            target[key] = value

    def _do_append(self) -> None:
        self._extend([self.stack.pop()])

    def _do_appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _Refused("it appends to something other than a list")
        target.extend(items)

    def _do_build(self) -> None:
        """A state dict's BUILD sets the attribute ``_metadata``, which nothing here needs."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _Refused("it sets attributes of something other than a dict")

    def _do_reduce(self) -> None:
        function, arguments = self._last(2)
        known = any(function is each for each in _CALLABLE.values())
        if not known or not isinstance(arguments, tuple):
            raise _Refused("it calls something that is no function of a tensor's")
        self.stack[-2:] = [function(*arguments)]

    def _do_binpersid(self) -> None:
        """("storage", type, key, device, number of elements) and, in old files, a view."""
        record = self.stack.pop()
        if not isinstance(record, tuple) or len(record) not in (5, 6) or any(record[5:]):
            raise _Refused("it has a persistent id that is no storage")
        tag, kind, key, _device, count = record[:5]
        if tag != "storage" or not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise _Refused("it has a persistent id that is no storage")
        (count,) = _naturals((count,), "a storage's size")
        self.stack.append(Storage(key, kind.dtype, count * kind.dtype.itemsize))
