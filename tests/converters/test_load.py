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
from jaxserve.model import decoder
from tests.helpers.checkpoints import make_checkpoint, prompt, reference_logits
from tests.helpers.dense import dense_logits
from tests.helpers.loading import load

DTYPES = ["float32", "bfloat16", "float16"]


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
def test_tensor_parallel_shards(tmp_path, size, format):
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
    tensors = load_file(tmp_path / "model.safetensors")
    assert seen[-1] == (sum(t.nbytes for t in tensors.values()),) * 2


def test_the_helpers_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path, tokenizer=True))
    assert len(tokenizer) == 263
    text = "the thing in a box ☃"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<s>user: hi</s>"
