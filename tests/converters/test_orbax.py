"""Orbax checkpoints give back what was saved, on any mesh."""

from __future__ import annotations

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from converters import open_checkpoint, orbax
from jaxserve.errors import CheckpointError, ConfigError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.loading import load

# After a restore that failed, threads of Orbax complain about their closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CASE = "qwen2-layer-types"  # 6 query heads, 2 KV heads, biases, 56 feed-forward features


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A checkpoint and its conversion."""
    root = tmp_path_factory.mktemp("orbax")
    path = make_checkpoint(root / "source", CASE, "bfloat16", tokenizer=True)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "top_k": 3}')
    source = open_checkpoint(path)
    orbax.save(root / "converted", source, load(source, dtype=jnp.bfloat16))
    return path, root / "converted"


@pytest.fixture
def copy(directories, tmp_path):
    """A conversion to damage."""
    return shutil.copytree(directories[1], tmp_path / "copy")


def test_description(directories):
    source, converted = (open_checkpoint(path) for path in directories)
    assert converted.config == source.config
    assert converted.eos_token_ids == source.eos_token_ids == (2, 5)
    assert converted.generation == source.generation == {"top_k": 3}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (directories[1] / name).read_bytes() == (directories[0] / name).read_bytes()


@pytest.mark.parametrize(("size", "dtype"), [(1, "bfloat16"), (2, "bfloat16"), (2, "float32")])
def test_round_trip(directories, size, dtype):
    seen: list[tuple[int, int]] = []
    expected, got = (
        load(path, size, jnp.dtype(dtype), lambda *args: seen.append(args)) for path in directories
    )
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        assert got[name].dtype == dtype
        assert got[name].sharding == array.sharding, name
        assert np.array_equal(got[name], array), name
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("case", ["llama-mha-tied", "llama-mqa-bias"])
@pytest.mark.parametrize("size", [1, 2])
def test_repeated_kv_heads(tmp_path, case, size):
    path = make_checkpoint(tmp_path / "source", case)
    source = open_checkpoint(path)
    orbax.save(tmp_path / "converted", source, load(source))
    expected, got = load(source, size), load(tmp_path / "converted", size)
    for name, array in expected.items():
        assert got[name].sharding == array.sharding, name
        assert np.array_equal(got[name], array), name


def test_save_refuses(directories, tmp_path):
    source = open_checkpoint(directories[0])
    params = load(source)
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        orbax.save(directories[1], source, params)
    with pytest.raises(CheckpointError, match="belong to another config"):
        orbax.save(tmp_path / "x", source, {"a": params["embed/tokens"]})
    mqa = open_checkpoint(make_checkpoint(tmp_path / "mqa", "llama-mqa-bias"))
    with pytest.raises(CheckpointError, match="tensor_parallel_size=1"):
        orbax.save(tmp_path / "x", mqa, load(mqa, 2))
    assert not (tmp_path / "x").exists()


def test_damage_is_explained(copy):
    description = json.loads((copy / orbax.CONFIG).read_text())

    def rewrite(**changes) -> None:
        (copy / orbax.CONFIG).write_text(json.dumps({**description, **changes}))

    rewrite(format_version=99)
    with pytest.raises(CheckpointError, match="newer jaxserve"):
        open_checkpoint(copy)
    rewrite(model={"vocab_size": 3})
    with pytest.raises(CheckpointError, match="model can't be read"):
        open_checkpoint(copy)
    rewrite(model={**description["model"], "vocab_size": 300})
    with pytest.raises(CheckpointError, match=r"embed\.tokens has shape \[263, 48\]"):
        load(copy)
    rewrite(model={**description["model"], "tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"not used head\.tokens"):
        load(copy)
    rewrite()

    for file in (copy / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="can't be restored"):
        load(copy)


def test_without_orbax(directories, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ConfigError, match=r"pip install jaxserve\[orbax\]"):
        load(directories[1])
