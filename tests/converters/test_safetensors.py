"""safetensors files: what the official library writes, and every way to damage it."""

from __future__ import annotations

import contextlib
import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from converters import open_checkpoint, safetensors
from jaxserve.errors import CheckpointError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.loading import load

TORCH_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def pack(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def read(tmp_path, content: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return {name: tensor.read() for name, tensor in safetensors.open_file(path).items()}


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    got = safetensors.open_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = got[name].read()
        assert array.shape == tuple(tensor.shape)
        assert f"torch.{array.dtype}" == str(dtype)
        assert array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_zero_sized_tensors_may_share_an_offset(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    got = read(tmp_path, pack({"a": empty, "b": empty, "c": F32}, bytes(8)))
    assert got["a"].shape == got["b"].shape == (0,)


def entry(**changes) -> dict:
    return {"a": {**F32, **changes}}


HUGE = [4194305, 4194305, 211106198978564]  # the product wraps around to 4 in 64 bits
DAMAGED = {
    "empty file": (b"", "truncated: 0 bytes"),
    "no header": (b"\0" * 8, "header would have 0 bytes"),
    "header longer than file": (pack(b"{}", length=100), "truncated: its header has 100"),
    "header over the limit": (pack(b"{}", length=100_000_001), "isn't a safetensors file"),
    "header of 2**63": (pack(b"{}", length=2**63), "isn't a safetensors file"),
    "not JSON": (pack(b"{'a': 1}"), "header isn't valid JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "header isn't valid JSON"),
    "deep nesting": (pack(b"[" * 200_000), "header isn't valid JSON"),
    "huge number": (pack(b'{"a": ' + b"9" * 10_000 + b"}"), "header isn't valid JSON"),
    "a list": (pack(b"[]"), "expected a JSON object"),
    "key twice": (pack(b'{"a": 1, "b": 1, "b": 2}'), "'b' appears twice"),
    "entry isn't an object": (pack({"a": 3}), "expected dtype, shape"),
    "entry lacks a key": (pack({"a": {"dtype": "F32", "shape": []}}), "expected dtype, shape"),
    "unknown dtype": (pack(entry(dtype="F31"), bytes(8)), "unknown dtype 'F31'"),
    "dtype isn't a string": (pack(entry(dtype=["F32"]), bytes(8)), "unknown dtype"),
    "negative size": (pack(entry(shape=[-2]), bytes(8)), "shape must be a list of non-neg"),
    "fractional size": (pack(entry(shape=[2.0]), bytes(8)), "shape must be a list of non-neg"),
    "boolean size": (pack(entry(shape=[True]), bytes(8)), "shape must be a list of non-neg"),
    "rank 40": (pack(entry(shape=[2] + [1] * 39), bytes(8)), "at most 32 sizes"),
    "shape and bytes differ": (pack(entry(shape=[3]), bytes(8)), "need 12"),
    "shape overflows": (pack(entry(shape=HUGE), bytes(8)), "need 14855"),
    "reversed": (pack(entry(data_offsets=[8, 0]), bytes(8)), "span -8 bytes"),
    "three offsets": (pack(entry(data_offsets=[0, 8, 8]), bytes(8)), "data_offsets two numbers"),
    "beyond the end": (pack(entry(), bytes(4)), "ends at byte 8 of 4"),
    "surplus bytes": (pack(entry(), bytes(12)), "4 bytes after the last tensor"),
    "gap": (pack(entry(data_offsets=[4, 12]), bytes(12)), "leaves a gap"),
    "overlap": (pack({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
    "same place": (pack({"a": F32, "b": F32}, bytes(8)), "overlaps"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_explained(tmp_path, name):
    content, message = DAMAGED[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, content)
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600


SOUND = pack(
    {"a": F32, "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]}}, bytes(12)
)


@settings(max_examples=300)
@given(st.integers(0, len(SOUND) - 1), st.binary(max_size=4), st.integers(0, 4))
def test_mutations_load_or_are_refused(tmp_path_factory, place, patch, cut):
    damaged = SOUND[:place] + patch + SOUND[place + cut :]
    with contextlib.suppress(CheckpointError):
        read(tmp_path_factory.getbasetemp(), damaged)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.safetensors", "isn't a plain file name"),
        ("/etc/passwd", "isn't a plain file name"),
        ("a\\b.safetensors", "isn't a plain file name"),
        ("..", "isn't a plain file name"),
        ("", "isn't a plain file name"),
        (3, "must be a string"),
        ("fifo.safetensors", "isn't a regular file"),
        ("link.safetensors", "symbolic link out of the model directory"),
        ("broken.safetensors", "broken symbolic link"),
        ("model-00009-of-00009.safetensors", "model-00009-of-00009.safetensors; the download"),
    ],
)
def test_index_entries_stay_inside(tmp_path, name, message):
    path = make_checkpoint(tmp_path / "model", format="safetensors-sharded")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(SOUND)
    os.mkfifo(path / "fifo.safetensors")
    (path / "link.safetensors").symlink_to(outside)
    (path / "broken.safetensors").symlink_to(tmp_path / "nothing")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    blobs = make_checkpoint(tmp_path / "models--a--b" / "blobs")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load(snapshot)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    path = make_checkpoint(tmp_path, format="safetensors-sharded")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.extra\.weight'"):
        load(path)


def test_a_tensor_in_two_shards(tmp_path):
    path = make_checkpoint(tmp_path, format="safetensors-sharded")
    (path / "model.safetensors.index.json").unlink()
    assert load(path)  # shards are recognised by their names, too
    first = sorted(path.glob("model-*"))[0]
    (path / "model-00099-of-00099.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="is in another file already"):
        load(path)
