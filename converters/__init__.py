"""Checkpoints in: Hugging Face directories (safetensors or .bin) and Orbax ones.

path = resolve_model("Qwen/Qwen3-0.6B")
checkpoint = open_checkpoint(path)
params = checkpoint.load(tree, specs, mesh, dtype)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from converters import families, safetensors, torch_bin
from converters.checkpoint import (
    Checkpoint,
    HuggingFaceCheckpoint,
    Progress,
    merged,
    read_generation,
)
from converters.fields import Fields
from converters.files import read_index, read_json, regular_file, required_file
from converters.hub import resolve_model
from converters.lazy import Lazy
from jaxserve import log
from jaxserve.errors import CheckpointError, ConfigError

__all__ = ["Checkpoint", "LoadFormat", "Progress", "open_checkpoint", "resolve_model"]

LoadFormat = Literal["auto", "safetensors", "pt", "dummy"]

OpenFile = Callable[[Path], dict[str, Lazy]]
_FORMATS: dict[str, tuple[str, str, OpenFile]] = {
    # the one file, the pattern of the shards, and what reads them
    "safetensors": ("model.safetensors", r"model-.*\.safetensors", safetensors.open_file),
    "pt": ("pytorch_model.bin", r"pytorch_model-.*\.bin", torch_bin.open_file),
}


def open_checkpoint(path: Path | str, load_format: str = "auto") -> Checkpoint:
    """Reads what a model directory says about itself; no weights yet.

    Args:
        path: a local directory, see ``resolve_model``.
        load_format: "auto" prefers safetensors to .bin; "safetensors" or "pt" insist on one;
            "dummy" needs config.json only, and its checkpoint has no weights to load.

    Raises:
        ConfigError: there is no such load format.
        CheckpointError: the directory holds no model, or a damaged one.
        UnsupportedModelError: it holds a model of an architecture that we don't have.
    """
    if load_format not in get_args(LoadFormat):
        raise ConfigError(
            f"load_format={load_format!r} is unknown; use one of {', '.join(get_args(LoadFormat))}."
        )
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory.")
    if regular_file(directory, "jaxserve_config.json") is not None and load_format in (
        "auto",
        "dummy",
    ):
        from converters import orbax

        return orbax.open_directory(directory)
    remedy = "give the directory of a Hugging Face model."
    if regular_file(directory, "params.json") is not None:
        remedy = "it is in Mistral's or Meta's own format; use the Hugging Face files instead."
    hf = read_json(required_file(directory, "config.json", remedy))
    family = families.find(hf)
    config = family.config(hf)
    fields = Fields(hf, "config.json")
    if "auto_map" in fields:
        log.own_code_is_not_run(directory, "model")
    ends = partial(families.more_end_tokens, family, config)
    eos_token_ids, generation = read_generation(directory, fields, config.vocab_size, ends)
    opener = None
    if load_format != "dummy":
        opener = _find_weights(
            directory, ["safetensors", "pt"] if load_format == "auto" else [load_format]
        )
    return HuggingFaceCheckpoint(
        directory, config, eos_token_ids, generation, families.layout_of(family, config), opener
    )


def _find_weights(directory: Path, formats: list[str]) -> Callable[[], dict[str, Lazy]]:
    """A function that opens the weights, in the first of the formats that is there.

    An index names the shards; without one, the single file or all files named like shards count.
    """
    for name in formats:
        single, pattern, open_file = _FORMATS[name]
        index = regular_file(directory, f"{single}.index.json")
        if index is not None:
            shards = read_index(index)
            for shard in shards:
                _shard(directory, shard)
            return partial(_open_index, directory, shards, open_file)
        names = sorted(p.name for p in directory.iterdir() if re.fullmatch(pattern, p.name))
        names = [single] if regular_file(directory, single) is not None else names
        if names:
            files = [_shard(directory, each) for each in names]
            return lambda: merged((file, open_file(file)) for file in files)
    wanted = " or ".join(_FORMATS[name][0] for name in formats)
    raise CheckpointError(
        f"{directory} has no {wanted} (nor shards of it). Download the model's weights, or use "
        "load_format='dummy' for random ones."
    )


def _shard(directory: Path, name: str) -> Path:
    return required_file(directory, name, "the download is incomplete; download the model again.")


def _open_index(
    directory: Path, shards: dict[str, list[str]], open_file: OpenFile
) -> dict[str, Lazy]:
    def parts() -> Iterator[tuple[Path, dict[str, Lazy]]]:
        for name, expected in shards.items():
            path = _shard(directory, name)
            tensors = open_file(path)
            missing = sorted(set(expected) - tensors.keys())
            if missing:
                raise CheckpointError(
                    f"{path} lacks the tensor {missing[0]!r}, which the index says it holds; "
                    "download the model again."
                )
            yield path, tensors

    return merged(parts())
