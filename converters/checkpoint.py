"""Checkpoints: what a model directory offers, whatever the format of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from converters import rules
from converters.fields import Fields
from converters.files import read_json, regular_file
from converters.lazy import Index, Lazy
from jaxserve.errors import CheckpointError
from jaxserve.model import decoder
from jaxserve.model.config import ModelConfig
from jaxserve.model.params import Param, Params

Progress = Callable[[int, int], None]
"""Called with the bytes loaded so far and the bytes in all."""

SAMPLING_DEFAULTS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
)
READERS = 4  # tensors read at once: enough to keep a disk busy while others go to the devices


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A model directory.

    Attributes:
        path: the directory.
        config: the model that it describes.
        eos_token_ids: tokens that end a text, from generation_config.json and config.json.
        generation: the sampling defaults of generation_config.json: those of its entries that
            ``SAMPLING_DEFAULTS`` names.
    """

    path: Path
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    generation: dict[str, Any]

    @abstractmethod
    def load(
        self,
        tree: Mapping[str, Param],
        specs: Mapping[str, PartitionSpec],
        mesh: Mesh,
        dtype: Any,
        progress: Progress | None = None,
    ) -> Params:
        """Loads the weights onto the devices of ``mesh``, each device reading its own part.

        Args:
            tree: ``decoder.declare`` of ``config``, or of what ``decoder.for_tensor_parallel``
                made of it.
            specs: by path, how a weight is split over the mesh.
            dtype: what the weights are cast to, but for those that have a dtype of their own.
            progress: called after each weight.

        Raises:
            CheckpointError: a tensor is missing, not used, damaged, or of the wrong shape.
        """


@dataclass(frozen=True)
class HuggingFaceCheckpoint(Checkpoint):
    """A directory as ``save_pretrained`` writes it.

    Attributes:
        layout: the renaming rules of its family.
        open_tensors: opens the files and gives the tensors by name; None where only the
            configuration is wanted.
    """

    layout: rules.Layout
    open_tensors: Callable[[], dict[str, Lazy]] | None

    def load(
        self,
        tree: Mapping[str, Param],
        specs: Mapping[str, PartitionSpec],
        mesh: Mesh,
        dtype: Any,
        progress: Progress | None = None,
    ) -> Params:
        """See ``Checkpoint.load``. Host memory holds at most ``READERS`` weights at a time."""
        if self.open_tensors is None:
            raise CheckpointError(f"{self.path} was opened with load_format='dummy': no weights.")
        declared = decoder.declare(self.config)
        check_same_paths(tree, declared)
        arrays = rules.plan(self.layout, self.open_tensors(), self.config, declared)
        arrays = {
            path: rules.repeat_kv_heads(array, declared[path], tree[path])
            for path, array in arrays.items()
        }

        def place(path: str) -> jax.Array:
            own = tree[path].dtype_in(np.dtype(dtype))
            return _place(arrays[path], NamedSharding(mesh, specs[path]), own)

        params: Params = {}
        done, total = 0, sum(array.nbytes for array in arrays.values())
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for path, array in zip(tree, pool.map(place, tree)):
                    params[path] = array
                    done += arrays[path].nbytes
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return params


def _place(array: Lazy, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    def read(index: Index | None) -> np.ndarray:
        values = array.read(index)
        if values.dtype == dtype and values.flags.writeable and values.flags.c_contiguous:
            return values
        # A view of the file must be copied: on a CPU, JAX would go on using the file's bytes.
        return np.array(values, dtype, order="C")

    return jax.make_array_from_callback(array.shape, sharding, read, dtype=dtype)


def check_same_paths(tree: Mapping[str, Param], declared: Mapping[str, Param]) -> None:
    """Raises CheckpointError if the load targets aren't the weights of the checkpoint's config."""
    different = sorted(tree.keys() ^ declared.keys())
    if different:
        raise CheckpointError(f"the load targets belong to another config: {different[:5]}")


def read_generation(
    directory: Path,
    config: Fields,
    vocab_size: int,
    more_ends: Callable[[Fields, tuple[int, ...]], tuple[int, ...]],
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The end-of-text ids and the sampling defaults of a directory.

    Ids outside of the vocabulary can't be generated, so they are left out.

    Args:
        config: config.json, whose eos_token_id counts as well.
        more_ends: gives further ends, see ``families.more_end_tokens``.

    Raises:
        CheckpointError: generation_config.json is damaged.
    """
    file = regular_file(directory, "generation_config.json")
    fields = Fields(read_json(file) if file else {}, "generation_config.json")
    ids = dict.fromkeys(fields.ids("eos_token_id") + config.ids("eos_token_id"))
    ids |= dict.fromkeys(more_ends(fields, tuple(ids)))
    defaults: dict[str, Any] = {}
    for key in SAMPLING_DEFAULTS:
        if key in fields:
            whole = key in ("top_k", "max_new_tokens")
            read = fields.integer if whole else fields.number
            defaults[key] = read(key, **({"minimum": 0} if whole else {"or_zero": True}))
    return tuple(each for each in ids if each < vocab_size), defaults


def merged(parts: Iterator[tuple[Path, dict[str, Lazy]]]) -> dict[str, Lazy]:
    """The tensors of several files together.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    tensors: dict[str, Lazy] = {}
    for path, part in parts:
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{path}: tensor {twice[0]!r} is in another file already.")
        tensors |= part
    return tensors
