"""Finds a model: a local directory, or a download from Hugging Face or ModelScope."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters.files import first_line
from jaxserve.errors import CheckpointError, ConfigError

# What a model needs first, then, only where there are no safetensors, the older weights.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_CONFIG = ["*.json"]
_BIN = ["pytorch_model*.bin"]
_ORBAX = ["params/*"]
# Other formats of the same weights, such as Meta's in original/ and Mistral's in consolidated*.
_OTHERS = ["*/*", "consolidated*"]


def resolve_model(
    name_or_path: str,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    config_only: bool = False,
) -> Path:
    """The local directory of a model, downloaded if need be.

    Args:
        name_or_path: a directory, or a name such as "Qwen/Qwen3-0.6B" on the Hugging Face hub (on
            ModelScope when JAXSERVE_USE_MODELSCOPE or VLLM_USE_MODELSCOPE is true).
        revision: branch, tag or commit of a download.
        download_dir: where downloads are kept; by default the hub's own cache.
        config_only: download no weights.

    Raises:
        CheckpointError: it is neither, or the download fails.
        ConfigError: ModelScope is wanted but not installed.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():  # Path("") is the current directory
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds the model.")
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w-])?"
    if not re.fullmatch(rf"{part}(?:/{part})?", name_or_path, re.ASCII) or ".." in name_or_path:
        raise CheckpointError(
            f"{str(name_or_path)[:200]!r} is neither a directory nor a model name such as "
            "'Qwen/Qwen3-0.6B'."
        )
    use_modelscope = any(
        os.environ.get(key, "").strip().lower() in ("1", "true", "yes", "on")
        for key in ("JAXSERVE_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    )
    snapshot = _modelscope() if use_modelscope else _hugging_face()
    options = {"revision": revision} if revision else {}  # the hubs' default branches differ
    if download_dir:
        options["cache_dir"] = str(download_dir)
    place = "ModelScope" if use_modelscope else "the Hugging Face hub"

    def download(allow: list[str], ignore: list[str]) -> Path:
        try:
            return Path(
                snapshot(name_or_path, allow_patterns=allow, ignore_patterns=ignore, **options)
            )
        except Exception as error:  # network, permission, disk, unknown name: many libraries' own
            reason = first_line(error)
            raise CheckpointError(
                f"{name_or_path!r} is no local directory, and downloading it from {place} failed: "
                f"{reason}. Check the name and the network; a gated model needs HF_TOKEN."
            ) from error

    if config_only:
        return download(_CONFIG, _OTHERS)
    directory = download(_FILES, _OTHERS)
    if (directory / "jaxserve_config.json").exists():
        return download(_ORBAX, [])
    if not any(directory.glob("*.safetensors")):
        return download(_BIN, _OTHERS)
    return directory


def _hugging_face() -> Callable[..., Any]:
    import huggingface_hub

    return huggingface_hub.snapshot_download


def _modelscope() -> Callable[..., Any]:
    try:
        import modelscope
    except ImportError:
        raise ConfigError(
            "JAXSERVE_USE_MODELSCOPE (or VLLM_USE_MODELSCOPE) is set, but modelscope is not "
            "installed: pip install jaxserve[modelscope]"
        ) from None
    return modelscope.snapshot_download
