"""Arrays that are read slice by slice, and the few operations that rearrange them unread.

A device that holds one shard of a fused weight asks for that shard only; the request travels down
through concatenations, repetitions and reshapes to the bytes of the file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

Index = tuple[slice, ...]


class Lazy(ABC):
    """An array of known ``shape`` and ``dtype`` whose values are read on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index | None = None) -> np.ndarray:
        """The values in ``index``: one slice of step 1 per axis; all of them by default.

        The result may be a read-only view of a file.
        """
        index = index if index is not None else (slice(None),) * len(self.shape)
        box = tuple(_bounds(part, size) for part, size in zip(index, self.shape, strict=True))
        extent = tuple(part.stop - part.start for part in box)
        return self._read(box) if math.prod(extent) else np.empty(extent, self.dtype)

    @abstractmethod
    def _read(self, box: Index) -> np.ndarray:
        """Like ``read``, where every slice has plain bounds and the result isn't empty."""

    def reshape(self, *shape: int) -> Lazy:
        """The same values in row-major order; the sizes must multiply to the same number."""
        return self if shape == self.shape else _Reshape(self, shape)

    def transpose(self, *axes: int) -> Lazy:
        """Axis i of the result is axis ``axes[i]`` of this array."""
        return _Transpose(self, axes)

    def repeat(self, times: int, axis: int) -> Lazy:
        """Each entry of ``axis`` ``times`` times in a row, like ``numpy.repeat``."""
        return self if times == 1 else _Repeat(self, times, axis)

    def __getitem__(self, index: Index) -> Lazy:
        return _Slice(self, index)


class FromArray(Lazy):
    """A NumPy array, for example a view of a memory-mapped file."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array.shape, array.dtype)
        self.array = array

    def _read(self, box: Index) -> np.ndarray:
        return self.array[box]


def concatenate(parts: Sequence[Lazy], axis: int) -> Lazy:
    """Arrays of one dtype, one after the other along an existing axis."""
    return parts[0] if len(parts) == 1 else _Concatenate(parts, axis)


def stack(parts: Sequence[Lazy]) -> Lazy:
    """Arrays of one shape and dtype along a new first axis."""
    return concatenate([part.reshape(1, *part.shape) for part in parts], 0)


def mapped(of: Lazy, function: Callable[[np.ndarray], np.ndarray], dtype: np.dtype) -> Lazy:
    """An array of ``dtype`` whose values are a function of those in the same places of another."""
    return _Mapped(of, function, dtype)


def _bounds(part: slice, size: int) -> slice:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"step {step} isn't supported")
    return slice(start, max(start, stop))


def _overlap(part: slice, start: int, stop: int) -> slice:
    return slice(max(part.start, start), min(part.stop, stop))


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


class _Mapped(Lazy):
    def __init__(
        self, of: Lazy, function: Callable[[np.ndarray], np.ndarray], dtype: np.dtype
    ) -> None:
        super().__init__(of.shape, dtype)
        self.of, self.function = of, function

    def _read(self, box: Index) -> np.ndarray:
        return self.function(self.of.read(box)).astype(self.dtype, copy=False)


class _Concatenate(Lazy):
    def __init__(self, parts: Sequence[Lazy], axis: int) -> None:
        shape = list(parts[0].shape)
        for part in parts:
            rest = [(n, m) for i, (n, m) in enumerate(zip(shape, part.shape)) if i != axis]
            if len(part.shape) != len(shape) or any(n != m for n, m in rest):
                raise ValueError(f"can't concatenate {[p.shape for p in parts]} on axis {axis}")
            if part.dtype != parts[0].dtype:
                raise ValueError(f"can't concatenate {[str(p.dtype) for p in parts]}")
        shape[axis] = sum(part.shape[axis] for part in parts)
        super().__init__(shape, parts[0].dtype)
        self.parts, self.axis = tuple(parts), axis

    def _read(self, box: Index) -> np.ndarray:
        out = np.empty([part.stop - part.start for part in box], self.dtype)
        wanted, begin = box[self.axis], 0
        for part in self.parts:
            end = begin + part.shape[self.axis]
            hit = _overlap(wanted, begin, end)
            if hit.start < hit.stop:
                into, of = [slice(None)] * len(box), list(box)
                into[self.axis] = _shift(hit, -wanted.start)
                of[self.axis] = _shift(hit, -begin)
                out[tuple(into)] = part.read(tuple(of))
            begin = end
        return out


class _Repeat(Lazy):
    def __init__(self, of: Lazy, times: int, axis: int) -> None:
        shape = list(of.shape)
        shape[axis] *= times
        super().__init__(shape, of.dtype)
        self.of, self.times, self.axis = of, times, axis

    def _read(self, box: Index) -> np.ndarray:
        wanted, inner = box[self.axis], list(box)
        first = wanted.start // self.times
        inner[self.axis] = slice(first, -(-wanted.stop // self.times))
        repeated = np.repeat(self.of.read(tuple(inner)), self.times, self.axis)
        crop = [slice(None)] * len(box)
        crop[self.axis] = _shift(wanted, -first * self.times)
        return repeated[tuple(crop)]


class _Transpose(Lazy):
    def __init__(self, of: Lazy, axes: Sequence[int]) -> None:
        if sorted(axes) != list(range(len(of.shape))):
            raise ValueError(f"{tuple(axes)} doesn't order the axes of {of.shape}")
        super().__init__([of.shape[axis] for axis in axes], of.dtype)
        self.of, self.axes = of, tuple(axes)

    def _read(self, box: Index) -> np.ndarray:
        inner = tuple(box[self.axes.index(axis)] for axis in range(len(box)))
        return self.of.read(inner).transpose(self.axes)


class _Slice(Lazy):
    def __init__(self, of: Lazy, index: Index) -> None:
        self.origin = tuple(_bounds(part, size) for part, size in zip(index, of.shape, strict=True))
        super().__init__([part.stop - part.start for part in self.origin], of.dtype)
        self.of = of

    def _read(self, box: Index) -> np.ndarray:
        return self.of.read(tuple(_shift(b, o.start) for b, o in zip(box, self.origin)))


class _Reshape(Lazy):
    """Splits and merges axes. Runs of axes with equal products are handled on their own, so that
    a slice in one run doesn't read more of the others."""

    def __init__(self, of: Lazy, shape: Sequence[int]) -> None:
        if math.prod(shape) != math.prod(of.shape):
            raise ValueError(f"can't reshape {of.shape} to {tuple(shape)}")
        super().__init__(shape, of.dtype)
        self.of = of

    def _read(self, box: Index) -> np.ndarray:
        inner: list[slice] = []  # what to read, in the old axes
        outer: list[slice] = []  # the same in the new axes, perhaps more than was asked for
        crops: list[slice] = []  # from each run of ``inner``, flat, to ``outer``
        lengths: list[int] = []
        for old, new in _runs(self.of.shape, self.shape):
            new_cover, flat = _cover(box[new], self.shape[new])
            old_cover, read = _cover(_unravel(flat, self.of.shape[old]), self.of.shape[old])
            inner += old_cover
            outer += new_cover
            lengths.append(read.stop - read.start)
            crops.append(_shift(flat, -read.start))
        values = self.of.read(tuple(inner)).reshape(lengths)[tuple(crops)]
        values = values.reshape([part.stop - part.start for part in outer])
        return values[tuple(_shift(b, -o.start) for b, o in zip(box, outer))]


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[slice, slice]]:
    """Cuts two shapes of one size (without zeros) into pairs of axis runs with equal products."""
    runs, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        a, b, first, other = old[i], new[j], i, j
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        runs.append((slice(first, i), slice(other, j)))
    if i < len(old) or j < len(new):  # axes of size 1
        runs.append((slice(i, len(old)), slice(j, len(new))))
    return runs


def _cover(box: Sequence[slice], shape: Sequence[int]) -> tuple[list[slice], slice]:
    """The smallest box that contains ``box`` and is contiguous, and its range in flat order."""
    cover, start, size, moving = [], 0, 1, False
    for part, length in zip(box, shape):
        part = slice(0, length) if moving else part
        moving = moving or part.stop - part.start > 1
        cover.append(part)
        start = start * length + part.start
        size *= part.stop - part.start
    return cover, slice(start, start + size)


def _unravel(flat: slice, shape: Sequence[int]) -> list[slice]:
    """Per axis, from the first to the last place of a flat range (any order within a row)."""
    box, first, last = [], flat.start, flat.stop - 1
    for length in reversed(shape):
        (first, low), (last, high) = divmod(first, length), divmod(last, length)
        box.append(slice(min(low, high), max(low, high) + 1))
    return box[::-1]
