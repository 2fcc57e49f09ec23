"""Any composition of lazy operations equals NumPy's, and reads no more than it must."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import rules
from converters.lazy import FromArray, Index, Lazy, concatenate, mapped, stack
from jaxserve.model.params import Param


class Counting(FromArray):
    """Counts the elements that are read."""

    count = 0

    def _read(self, box: Index) -> np.ndarray:
        values = super()._read(box)
        self.count += values.size
        return values


@st.composite
def factors(draw, size: int) -> tuple[int, ...]:
    """A shape of the given size, perhaps with ones in it."""
    shape = []
    while size > 1:
        divisors = [d for d in range(2, size + 1) if size % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def indices(draw, shape: tuple[int, ...]) -> Index:
    bounds = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple(slice(*pair) for pair in bounds)


Pair = tuple[Lazy, np.ndarray]


@st.composite
def grown(draw, pair: Pair) -> Pair:
    """One more operation on a lazy array and on the NumPy array that it must equal."""
    lazy, array = pair
    axes = range(array.ndim)
    names = ["reshape", "transpose", "stack"] + ["repeat", "concatenate", "slice"] * (
        array.ndim > 0
    )
    name = draw(st.sampled_from(names))
    if name == "reshape" and array.size:
        shape = draw(factors(array.size))
        return lazy.reshape(*shape), array.reshape(shape)
    if name == "transpose":
        order = draw(st.permutations(axes))
        return lazy.transpose(*order), array.transpose(order)
    if name == "stack" and array.ndim < 5:
        return stack([lazy, FromArray(array + 1)]), np.stack([array, array + 1])
    if name == "repeat":
        axis, times = draw(st.sampled_from(axes)), draw(st.integers(1, 3))
        return lazy.repeat(times, axis), array.repeat(times, axis)
    if name == "concatenate":
        axis = draw(st.sampled_from(axes))
        parts, arrays = [lazy, FromArray(array * 2), lazy], [array, array * 2, array]
        return concatenate(parts, axis), np.concatenate(arrays, axis)
    if name == "slice":
        index = draw(indices(array.shape))
        return lazy[index], array[index]
    return pair


@settings(max_examples=300)
@given(st.data())
def test_any_composition_equals_numpy(data):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    pair: Pair = (FromArray(array), array)
    for _ in range(data.draw(st.integers(0, 5))):
        if pair[1].size > 3000:
            break
        pair = data.draw(grown(pair))
    lazy, array = pair
    assert lazy.shape == array.shape
    assert lazy.nbytes == array.nbytes
    np.testing.assert_array_equal(lazy.read(), array)
    index = data.draw(indices(array.shape))
    np.testing.assert_array_equal(lazy.read(index), array[index])


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_a_shard_of_a_fused_weight_reads_only_its_rows(kv_heads):
    hidden, heads, size = 5, 8, 3
    sources = [
        Counting(np.random.default_rng(n).standard_normal((n * size, hidden)).astype(np.float32))
        for n in (heads, 4, 4)
    ]
    axes = ("kv_heads", None, None, None)
    declared = Param((4, heads // 4 + 2, size, hidden), axes)
    target = Param((kv_heads, heads // kv_heads + 2, size, hidden), axes)
    named = tuple(rules.Source(name, array) for name, array in zip("qkv", sources))
    fused = rules.repeat_kv_heads(rules.fuse_qkv(named, declared), declared, target)
    assert fused.shape == target.shape

    shard = fused.read((slice(2, 4), *[slice(None)] * 3))
    per_head = size * hidden
    assert sources[0].count == 2 * heads // kv_heads * per_head
    assert sources[1].count == sources[2].count == 2 * 4 // kv_heads * per_head

    q, k, v = (source.array.reshape(-1, size, hidden) for source in sources)
    times, group = kv_heads // 4, heads // kv_heads
    for i, head in enumerate((2, 3)):
        np.testing.assert_array_equal(shard[i, :group], q[head * group : (head + 1) * group])
        np.testing.assert_array_equal(shard[i, -2], k[head // times])
        np.testing.assert_array_equal(shard[i, -1], v[head // times])


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_queries_keys_and_values_may_be_one_tensor(hidden):
    kv_heads, group, size = 2, 3, 4
    param = Param((kv_heads, group + 2, size, *hidden), (None,) * (3 + len(hidden)))
    wanted = np.random.default_rng(0).standard_normal(param.shape)

    def source(array: np.ndarray) -> tuple[rules.Source]:
        return (rules.Source("qkv", FromArray(array.reshape(-1, *hidden))),)

    by_group = rules.split_groups(source(wanted), param)
    q, k, v = wanted[:, :group], wanted[:, group], wanted[:, group + 1]
    in_turn = np.concatenate([part.reshape(-1, *hidden) for part in (q, k, v)])
    by_part = rules.split_qkv(source(in_turn), param)
    for fused in (by_group, by_part):
        np.testing.assert_array_equal(fused.read(), wanted)


def test_norms_of_heads_are_repeated_like_the_heads():
    """Scales of 4 queries and a key per KV head, of 1 KV head that becomes 2."""
    declared, target = (Param(shape, ("kv_heads", None, None)) for shape in ((1, 5, 3), (2, 3, 3)))
    scales = np.arange(15.0).reshape(1, 5, 3)
    repeated = rules.repeat_kv_heads(FromArray(scales), declared, target).read()
    np.testing.assert_array_equal(repeated, scales[0][np.array([[0, 1, 4], [2, 3, 4]])])


def test_an_output_projection_reads_only_its_columns():
    source = Counting(np.arange(24.0).reshape(2, 12))
    shard = source.reshape(2, 4, 3).read((slice(None), slice(1, 2), slice(None)))
    np.testing.assert_array_equal(shard, source.array.reshape(2, 4, 3)[:, 1:2])
    assert source.count == 6


def test_a_changed_array_reads_only_what_is_asked_for():
    source = Counting(np.arange(24.0).reshape(2, 12))
    doubled = mapped(source, lambda values: values * 2, np.dtype(np.float32))
    assert (doubled.shape, doubled.dtype) == ((2, 12), np.float32)
    read = doubled.read((slice(1, 2), slice(3, 6)))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, [[30, 32, 34]])
    assert source.count == 3


def test_one_is_added_in_float32():
    weight = np.array([0.0019, -0.0019], ml_dtypes.bfloat16)  # one plus it has no bfloat16
    source = rules.Source("norm", FromArray(weight))
    scale = rules.one_plus((source,), Param((2,), (None,))).read()
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, 1 + weight.astype(np.float64))


def test_mistakes_are_refused():
    array = FromArray(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="can't reshape"):
        array.reshape(4, 2)
    with pytest.raises(ValueError, match="doesn't order"):
        array.transpose(0, 0)
    with pytest.raises(ValueError, match="can't concatenate"):
        concatenate([array, FromArray(np.zeros((2, 4), np.float32))], 0)
    with pytest.raises(ValueError, match="can't concatenate"):
        concatenate([array, FromArray(np.zeros((2, 3), np.float16))], 0)
    with pytest.raises(ValueError, match="step"):
        array.read((slice(0, 2, 2), slice(None)))
