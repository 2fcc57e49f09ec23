"""Weights are declared once: their shardings, random values and sizes follow."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from converters import open_checkpoint
from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
from jaxserve.errors import ConfigError
from jaxserve.model import decoder, params
from jaxserve.model.params import Param
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.hf import make_llama

WHOLE = PartitionSpec(None)


def tree_of(directory: Path, size: int = 1) -> dict[str, Param]:
    config = open_checkpoint(directory).config
    return decoder.declare(decoder.for_tensor_parallel(config, size))


def test_each_weight_is_split_along_its_own_axis(tmp_path: Path) -> None:
    tree = tree_of(make_llama(tmp_path, vocab_size=264, attention_bias=True, mlp_bias=True))
    specs = params.partition_specs(tree, LOGICAL_TO_MESH, {"tensor": 4})
    layer = {
        path.removeprefix("layers/0/"): spec
        for path, spec in specs.items()
        if path.startswith("layers/0/")
    }
    assert layer == {
        "attention/qkv": PartitionSpec("tensor", None, None, None),
        "attention/qkv_bias": PartitionSpec("tensor", None, None),
        "attention/out": PartitionSpec(None, "tensor", None),
        "attention/out_bias": WHOLE,  # added once, after the sum over devices
        "ffn/up": PartitionSpec(None, "tensor", None),
        "ffn/up_bias": PartitionSpec(None, "tensor"),
        "ffn/down": PartitionSpec(None, "tensor"),
        "ffn/down_bias": WHOLE,
        "attention_norm/scale": WHOLE,
        "ffn_norm/scale": WHOLE,
    }
    assert specs["embed/tokens"] == specs["head/tokens"] == PartitionSpec("tensor", None)
    assert specs["head/norm/scale"] == WHOLE


def test_what_does_not_divide_stays_whole() -> None:
    tree = {"a": Param((263, 8), ("vocab", None)), "b": Param((264, 8), ("vocab", "unknown"))}
    specs = params.partition_specs(tree, LOGICAL_TO_MESH, {"tensor": 8})
    assert specs == {"a": PartitionSpec(None, None), "b": PartitionSpec("tensor", None)}


def test_kv_heads_are_repeated_where_there_are_too_few(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, num_key_value_heads=2)
    shapes = {size: tree_of(directory, size)["layers/0/attention/qkv"].shape for size in (1, 2, 4)}
    assert shapes == {1: (2, 6, 8, 48), 2: (2, 6, 8, 48), 4: (4, 4, 8, 48)}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            3,
            "size=3 doesn't divide 8 attention heads and 2 KV heads; use 1, 2, 4, 8",
        ),
        (16, "tensor_parallel_size=16 doesn't divide 8 attention heads"),
    ],
)
def test_heads_that_do_not_split_are_refused(size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tree_of(make_llama(tmp_path, num_key_value_heads=2), size)


def test_too_few_devices_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=f"JAX sees {len(jax.devices())}"):
        make_mesh(99)


def test_random_weights_fit_the_declaration(tmp_path: Path) -> None:
    tree = tree_of(make_checkpoint(tmp_path, "llama-mqa-bias"))
    mesh = make_mesh(2)
    specs = params.partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    first, second, other = (
        params.random_params(tree, jnp.dtype("bfloat16"), mesh, specs, seed) for seed in (0, 0, 1)
    )
    assert first.keys() == tree.keys()
    for path, param in tree.items():
        array = np.asarray(first[path], np.float32)
        assert (first[path].shape, first[path].dtype) == (param.shape, jnp.bfloat16)
        assert first[path].sharding.spec == specs[path]
        np.testing.assert_array_equal(array, np.asarray(second[path], np.float32))
        if param.init == "normal":
            assert 0.01 < array.std() < 0.03
            assert (array != np.asarray(other[path], np.float32)).any()
        else:
            assert (array == (1 if param.init == "ones" else 0)).all()
    equal = [p for p in tree if tree[p].init == "normal" and tree[p].shape == (48, 48)]
    assert len({np.asarray(first[path], np.float32).tobytes() for path in equal}) == len(equal)


def test_sizes(tmp_path: Path) -> None:
    tree = {"a": Param((3, 5), (None, None)), "b": Param((7,), (None,))}
    assert params.num_bytes(tree, jnp.dtype("bfloat16")) == 2 * (15 + 7)
    shapes = params.abstract(tree, jnp.dtype("float32"))
    assert {path: (each.shape, each.dtype) for path, each in shapes.items()} == {
        "a": ((3, 5), jnp.float32),
        "b": ((7,), jnp.float32),
    }


def test_shape_and_axes_belong_together() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Param((3, 5), (None,))


def test_paths_are_put_under_a_prefix_and_taken_out_again() -> None:
    tree = {"scale": Param((3,), (None,)), "sub/bias": Param((3,), (None,))}
    inside = params.prefixed("layers/1", tree)
    assert list(inside) == ["layers/1/scale", "layers/1/sub/bias"]
    outside = {**inside, "layers/11/scale": Param((4,), (None,))}
    assert params.under("layers/1", outside) == tree
