"""Loading: formats, dtypes, sharding, memory, and what is said when something doesn't fit."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import checkpoint as checkpoint_module
from converters import open_checkpoint
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxserve.model import decoder
from tests.helpers.checkpoints import make_checkpoint, prompt, reference_logits
from tests.helpers.dense import dense_logits
from tests.helpers.loading import load

DTYPES = ["float32", "bfloat16", "float16"]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama-mqa-bias", "opt-350m"])
def test_all_formats_give_the_same_weights(tmp_path, case, dtype):
    weights = []
    for format in ("safetensors", "safetensors-sharded", "bin", "bin-sharded"):
        path = make_checkpoint(tmp_path / format, case, dtype, format)
        assert open_checkpoint(path).config.dtype == dtype
        assert len(list(path.glob("*.bin*"))) == {"bin": 1, "bin-sharded": 4}.get(format, 0)
        weights.append(load(path, dtype=jnp.dtype(dtype)))
    for other in weights[1:]:
        for name, array in weights[0].items():
            assert array.dtype == dtype
            assert np.array_equal(array, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_logits_of_half_precision_files(tmp_path, dtype):
    path = make_checkpoint(tmp_path, "qwen3", dtype)
    expected = reference_logits(path, prompt("qwen3"))
    logits = dense_logits(open_checkpoint(path).config, load(path), prompt("qwen3"))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_logits_of_bin_files(tmp_path):
    path = make_checkpoint(tmp_path, "opt-125m", format="bin-sharded")
    expected = reference_logits(path, prompt("opt-125m"))
    logits = dense_logits(open_checkpoint(path).config, load(path), prompt("opt-125m"))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts(tmp_path, source, target):
    path = make_checkpoint(tmp_path, dtype=source)
    exact, cast = load(path), load(path, dtype=jnp.dtype(target))
    for name, array in cast.items():
        assert np.array_equal(array, exact[name].astype(target)), name


# 6 query heads and 2 KV heads: over 2 devices the KV heads split; over 6 each is there 3 times.
@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_tensor_parallel_shards(tmp_path, monkeypatch, size, format):
    config_changes = {"intermediate_size": 72}  # a multiple of 6
    path = make_checkpoint(tmp_path, "llama-gqa", format="safetensors")
    tensors = load_file(path / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        shape = tuple(72 if n == 56 else n for n in tensor.shape)
        tensors[name] = rng.standard_normal(shape).astype(np.float32)
    write_weights(path, tensors, format)
    text = json.loads((path / "config.json").read_text()) | config_changes
    (path / "config.json").write_text(json.dumps(text))

    whole, split = load(path), load(path, size)
    config = open_checkpoint(path).config
    targets = decoder.declare(decoder.for_tensor_parallel(config, size))
    kv_heads = max(2, size)
    for name, array in split.items():
        assert array.shape == targets[name].shape
        assert len(array.addressable_shards) == size
    for name in ("qkv", "out"):
        array = split[f"layers/0/attention/{name}"]
        axis = 0 if name == "qkv" else 1
        shards = {shard.data.shape[axis] for shard in array.addressable_shards}
        assert shards == {kv_heads // size}
    assert {s.data.shape for s in split["layers/1/ffn/up"].addressable_shards} == {
        (2, 72 // size, 48)
    }
    qkv, wide = (np.asarray(p["layers/0/attention/qkv"]) for p in (whole, split))
    group, times = 3 * 2 // kv_heads, kv_heads // 2
    heads = qkv[:, :3].reshape(6, 8, 48)
    for head in range(kv_heads):
        np.testing.assert_array_equal(wide[head, :group], heads[head * group : (head + 1) * group])
        np.testing.assert_array_equal(wide[head, group:], qkv[head // times, 3:])
    out = np.asarray(whole["layers/0/attention/out"]).reshape(48, -1)
    np.testing.assert_array_equal(np.asarray(split["layers/0/attention/out"]).reshape(48, -1), out)


def write_weights(path: Path, tensors: dict[str, np.ndarray], format: str) -> None:
    if format == "safetensors":
        save_file(tensors, path / "model.safetensors")
        return
    import torch

    (path / "model.safetensors").unlink()
    torch.save({name: torch.tensor(t) for name, t in tensors.items()}, path / "pytorch_model.bin")


@pytest.mark.parametrize("size", [1, 4])
def test_host_memory_stays_near_the_largest_weight(tmp_path, monkeypatch, size):
    """Staging memory: the devices' own copies, which are host memory on a CPU, don't count."""
    hidden, width, vocab, layers = 256, 768, 4096, 8
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    tensors = {
        "model.embed_tokens.weight": np.ones((vocab, hidden), np.float32),
        "lm_head.weight": np.ones((vocab, hidden), np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in "qkvo":
            weight = np.ones((hidden, hidden), np.float32)
            tensors[f"{layer}self_attn.{name}_proj.weight"] = weight
        for name, shape in {
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
        }.items():
            tensors[f"{layer}mlp.{name}_proj.weight"] = np.ones(shape, np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = np.ones(hidden, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    total = sum(tensor.nbytes for tensor in tensors.values())
    del tensors

    def discard(shape, sharding, callback, dtype):
        for index in sharding.addressable_devices_indices_map(shape).values():
            assert math.prod(callback(index).shape) * size >= math.prod(shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    monkeypatch.setattr(checkpoint_module, "READERS", 1)
    monkeypatch.setattr(jax, "make_array_from_callback", discard)
    opened = open_checkpoint(tmp_path)
    tracemalloc.start()
    load(opened, size, jnp.bfloat16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = vocab * hidden * 4
    assert total > 5 * largest
    assert peak < 1.3 * largest / size + 500_000


def test_progress_counts_up_to_all_bytes(tmp_path):
    seen: list[tuple[int, int]] = []
    load(make_checkpoint(tmp_path), progress=lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == (tmp_path / "model.safetensors").stat().st_size // 8 * 8
        - (header_bytes(tmp_path / "model.safetensors"))
    )


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


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


def test_the_helpers_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path, tokenizer=True))
    assert len(tokenizer) == 263
    text = "the thing in a box ☃"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<s>user: hi</s>"
