"""Orbax checkpoints: weights already fused and named as ours, restored shard by shard.

A directory holds

    jaxserve_config.json   the ModelConfig, end-of-text ids and sampling defaults
    params/                the weights, an Orbax PyTree with "." for "/" in the paths
    tokenizer files        copied from the source

KV heads are saved once, also where a run repeats them for tensor parallelism.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from converters.checkpoint import Checkpoint, Progress, check_same_paths
from converters.fields import Fields
from converters.files import first_line, preview, read_json, regular_file, required_file
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.model import decoder
from jaxserve.model.config import ModelConfig
from jaxserve.model.params import Param, Params

CONFIG = "jaxserve_config.json"
FORMAT_VERSION = 1
CHUNK_BYTES = 64 << 20  # a device that restores a shard reads whole chunks

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def _orbax() -> ModuleType:
    try:
        import orbax.checkpoint
    except ImportError:
        raise ConfigError(
            "Orbax checkpoints need orbax-checkpoint: pip install jaxserve[orbax]"
        ) from None
    return orbax.checkpoint


def save(directory: Path | str, source: Checkpoint, params: Mapping[str, jax.Array]) -> None:
    """Writes an Orbax checkpoint.

    Args:
        directory: must not exist, or be empty.
        source: the checkpoint that the weights come from; its config, its sampling defaults and
            its tokenizer files go along.
        params: its weights, loaded for ``decoder.declare(source.config)``, in any sharding.

    Raises:
        CheckpointError: the directory isn't empty, or the weights aren't those of the config.
        ConfigError: Orbax isn't installed.
    """
    ocp = _orbax()
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an empty directory.")
    declared = decoder.declare(source.config)
    check_same_paths({path: declared.get(path, Param((), ())) for path in params}, declared)
    for path, array in params.items():
        if array.shape != declared[path].shape:
            raise CheckpointError(
                f"{path} has shape {list(array.shape)}; to save it, load the checkpoint with "
                f"tensor_parallel_size=1, which gives {list(declared[path].shape)}."
            )
    directory.mkdir(parents=True, exist_ok=True)
    tree = {_key(path): array for path, array in params.items()}
    chunks = {key: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for key in tree}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "params", tree, save_args=chunks)
    for name in COPIED:
        file = regular_file(source.path, name)
        if file is not None:
            shutil.copyfile(file, directory / name)
    entries = {
        "format_version": FORMAT_VERSION,
        "model": json.loads(source.config.to_json()),
        "eos_token_ids": list(source.eos_token_ids),
        "generation": source.generation,
    }
    # Written last: a directory without it isn't taken for a checkpoint.
    (directory / CONFIG).write_text(json.dumps(entries, indent=2) + "\n")


def open_directory(directory: Path) -> OrbaxCheckpoint:
    """Reads the description of a directory that ``save`` wrote.

    Raises:
        CheckpointError: it is damaged, or written by a newer version.
    """
    path = required_file(directory, CONFIG, "it is no Orbax checkpoint of ours.")
    fields = Fields(read_json(path), str(path))
    if fields.integer("format_version") > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a newer jaxserve; update jaxserve.")
    model, generation = fields.section("model"), fields.section("generation")
    if model is None:
        raise fields.wrong("model", "a JSON object")
    try:
        config = ModelConfig.from_json(json.dumps(model.values))
        decoder.declare(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: model can't be read: {error}") from None
    defaults = dict(generation.values) if generation is not None else {}
    return OrbaxCheckpoint(directory, config, fields.ids("eos_token_ids"), defaults)


@dataclass(frozen=True)
class OrbaxCheckpoint(Checkpoint):
    """A directory that ``save`` wrote."""

    def load(
        self,
        tree: Mapping[str, Param],
        specs: Mapping[str, PartitionSpec],
        mesh: Mesh,
        dtype: Any,
        progress: Progress | None = None,
    ) -> Params:
        """See ``Checkpoint.load``; ``progress`` is called once, at the end."""
        ocp = _orbax()
        declared = decoder.declare(self.config)
        check_same_paths(tree, declared)
        shardings = {path: NamedSharding(mesh, specs[path]) for path in tree}
        targets = {
            _key(path): jax.ShapeDtypeStruct(
                param.shape,
                param.dtype_in(jnp.dtype(dtype)),
                sharding=shardings[path]
                if param.shape == tree[path].shape
                else _split_anywhere(mesh, param.shape),
            )
            for path, param in declared.items()
        }
        self._check_saved(ocp, targets)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore((self.path / "params").absolute(), targets)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._damaged(error) from error
        params: Params = {}
        for path, param in declared.items():
            array = restored.pop(_key(path))
            if param.shape != tree[path].shape:
                array = _repeat_kv_heads(array, param, tree[path], shardings[path])
            params[path] = array
        if progress is not None:
            total = sum(array.nbytes for array in params.values())
            progress(total, total)
        return params

    def _check_saved(self, ocp: ModuleType, targets: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Compares names and shapes with the config, which Orbax itself explains less well."""
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                metadata = checkpointer.metadata((self.path / "params").absolute())
            tree = metadata.item_metadata.tree
            saved = {key: tuple(entry.shape) for key, entry in tree.items()}
        except Exception as error:
            raise self._damaged(error) from error
        missing, surplus = sorted(targets.keys() - saved), sorted(saved.keys() - targets.keys())
        if missing or surplus:
            raise CheckpointError(
                f"{self.path / 'params'} and {CONFIG} belong to different models: missing "
                f"{preview(missing) or 'nothing'}, not used {preview(surplus) or 'nothing'}."
            )
        for key, target in targets.items():
            if saved[key] != target.shape:
                raise CheckpointError(
                    f"{self.path / 'params'}: {key} has shape {list(saved[key])}, but {CONFIG} "
                    f"implies {list(target.shape)}."
                )

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path / 'params'} can't be restored: {first_line(error)}. "
            "Convert the model again."
        )


def _key(path: str) -> str:
    return path.replace("/", ".")


def _split_anywhere(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Splits the first axis that can be, so that no device restores the whole weight."""
    (name,) = mesh.axis_names
    for axis, size in enumerate(shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, name))
    return NamedSharding(mesh, PartitionSpec())


def _repeat_kv_heads(
    array: jax.Array, declared: Param, target: Param, sharding: NamedSharding
) -> jax.Array:
    """``rules.repeat_kv_heads`` on the devices."""

    def repeat(x: jax.Array) -> jax.Array:
        if declared.axes[0] != "kv_heads":
            return x.reshape(target.shape)
        times = target.shape[0] // declared.shape[0]
        q = x[:, :-2].reshape(target.shape[0], -1, *target.shape[2:])
        return jnp.concatenate([q, jnp.repeat(x[:, -2:], times, 0)], 1)

    return jax.jit(repeat, out_shardings=sharding)(array)
