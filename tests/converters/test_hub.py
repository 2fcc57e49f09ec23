"""Model names become directories; what can't is explained in one sentence."""

from __future__ import annotations

import sys
import types

import huggingface_hub
import pytest

from converters import resolve_model
from jaxserve.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def no_modelscope(monkeypatch):
    monkeypatch.delenv("JAXSERVE_USE_MODELSCOPE", raising=False)
    monkeypatch.delenv("VLLM_USE_MODELSCOPE", raising=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories hold the files that a test puts into ``files``."""
    fake = types.SimpleNamespace(files=["config.json", "model.safetensors"], calls=[])

    def snapshot_download(name, **options):
        fake.calls.append((name, options))
        for file in fake.files:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fake.download = snapshot_download
    return fake


def test_a_directory_is_used_as_it_is(tmp_path, hub):
    assert resolve_model(str(tmp_path)) == tmp_path
    assert not hub.calls


def test_download(tmp_path, hub):
    assert resolve_model("Qwen/Qwen3-0.6B", "main", tmp_path / "cache") == tmp_path
    ((name, options),) = hub.calls
    assert name == "Qwen/Qwen3-0.6B"
    assert options["revision"] == "main"
    assert options["cache_dir"] == str(tmp_path / "cache")
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(".bin" in pattern for pattern in options["allow_patterns"])


def test_bin_files_only_where_there_are_no_safetensors(tmp_path, hub):
    hub.files = ["config.json"]
    resolve_model("facebook/opt-125m")
    assert hub.calls[1][1]["allow_patterns"] == ["pytorch_model*.bin"]


def test_orbax_weights_are_downloaded(tmp_path, hub):
    hub.files = ["jaxserve_config.json"]
    resolve_model("me/converted")
    assert hub.calls[1][1]["allow_patterns"] == ["params/*"]


@pytest.mark.parametrize(
    "name", ["", "/no/such/dir", "./model", "~/model", "a/b/c", "a/../b", "a b", "a//b", "-x/y"]
)
def test_implausible_names(name, hub):
    with pytest.raises(CheckpointError, match="neither a directory nor a model name"):
        resolve_model(name)
    assert not hub.calls


def test_a_file(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_failed_download(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("a/b")
    assert "Hugging Face hub failed: no route to host. Check the name" in str(caught.value)
    assert "more lines" not in str(caught.value)


@pytest.mark.parametrize("key", ["JAXSERVE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"])
def test_modelscope(key, hub, tmp_path, monkeypatch):
    monkeypatch.setenv(key, "True")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"pip install jaxserve\[modelscope\]"):
        resolve_model("a/b")
    fake = types.ModuleType("modelscope")
    fake.snapshot_download = hub.download
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert resolve_model("a/b") == tmp_path
    assert hub.calls[0][0] == "a/b"
