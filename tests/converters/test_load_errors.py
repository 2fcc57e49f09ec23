"""What is said when the weights, the files and config.json don't fit each other."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import open_checkpoint
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.loading import load


def edit(path: Path, **changes) -> None:
    """Changes tensors of model.safetensors; None removes one, and "__" stands for a dot."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")


def test_missing_tensors(tmp_path):
    path = make_checkpoint(tmp_path)
    edit(path, model__norm__weight=None, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith("2 tensors are missing: ")
    assert "layers.1.mlp.up_proj.weight, norm.weight" in message
    assert "download is incomplete" in message


def test_surplus_tensors(tmp_path):
    path = make_checkpoint(tmp_path)
    names = {f"model__extra{i}__weight": np.zeros(2, np.float32) for i in range(9)}
    edit(path, **names)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith("9 tensors fit no weight of LlamaForCausalLM")
    assert "model.extra4.weight and 4 more" in message
    assert "Check that config.json belongs to these weights" in message


def test_known_ballast_is_dropped(tmp_path):
    path = make_checkpoint(tmp_path, "llama-mha-tied")
    ballast = np.zeros(4, np.float32)
    edit(path, model__layers__0__self_attn__rotary_emb__inv_freq=ballast, lm_head__weight=ballast)
    assert load(path)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (8, 48), [16, 48]),
        ("model.layers.0.self_attn.q_proj.weight", (48, 47), [48, 48]),
        ("model.layers.1.self_attn.o_proj.weight", (48, 6, 8), [48, 48]),
        ("model.layers.1.mlp.gate_proj.weight", (55, 48), [56, 48]),
        ("model.embed_tokens.weight", (264, 48), [263, 48]),
        ("model.norm.weight", (48, 1), [48]),
    ],
)
def test_wrong_shapes(tmp_path, name, shape, expected):
    path = make_checkpoint(tmp_path)
    edit(path, **{name: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert f"tensor '{name}' has shape {list(shape)}" in message
    assert f"config.json implies {expected}" in message


def test_other_dtypes(tmp_path):
    path = make_checkpoint(tmp_path)
    edit(path, model__norm__weight=np.zeros(48, np.int8))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has dtype int8; expected"):
        load(path)
    edit(path, model__norm__weight=np.ones(48, np.float32))
    edit(path, **{"model.layers.0.self_attn.k_proj.weight": np.zeros((16, 48), np.float16)})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight.* can't be combined"):
        load(path)


def test_two_names_of_one_weight(tmp_path):
    path = make_checkpoint(tmp_path)
    edit(path, norm__weight=np.zeros(48, np.float32))
    with pytest.raises(CheckpointError, match="mean the same weight"):
        load(path)


def test_damage_that_reading_finds_stops_the_load(tmp_path):
    path = make_checkpoint(tmp_path)
    opened = open_checkpoint(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load(opened)


def test_foreign_targets(tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="belong to another config"):
        checkpoint.load({}, {}, None, jnp.float32)


def test_load_formats(tmp_path):
    path = make_checkpoint(tmp_path, format="bin")
    assert load(open_checkpoint(path, "pt"))
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors \(nor shards"):
        open_checkpoint(path, "safetensors")
    with pytest.raises(ConfigError, match="'npz' is unknown; use one of auto, safetensors"):
        open_checkpoint(path, "npz")
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        open_checkpoint(path)
    dummy = open_checkpoint(path, "dummy")
    assert dummy.config.vocab_size == 263
    with pytest.raises(CheckpointError, match="load_format='dummy'"):
        load(dummy)


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Mistral's or Meta's own format"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is no directory"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnsupportedModelError, match="'t5' is not supported"):
        open_checkpoint(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**10)  # a sparse file
    with pytest.raises(CheckpointError, match="10000000000 bytes; at most"):
        open_checkpoint(tmp_path)
