"""The files of a model directory. They come from strangers, so nothing in them is trusted."""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20


def regular_file(directory: Path, name: str) -> Path | None:
    """The path of the file ``name`` of a model directory, or None if there is none.

    Symbolic links may stay inside the directory, or lead to the ``blobs`` folder of the Hugging
    Face hub's cache, where ``<repository>/snapshots/<revision>/<file>`` is a link to
    ``<repository>/blobs/<hash>``.

    Raises:
        CheckpointError: ``name`` isn't a plain file name, leads elsewhere, or isn't a regular file.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(
            f"{directory}: {name!r} isn't a plain file name; refusing to open it."
        )
    path = directory / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a broken symbolic link; download the model again."
            ) from None
        return None
    except (OSError, RuntimeError) as error:  # a loop of links, no permission
        raise CheckpointError(f"{path} can't be opened: {error}") from None
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a symbolic link out of the model directory; refusing to follow it. "
            "Copy or hard-link the file instead."
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} isn't a regular file; refusing to open it.")
    return path


def required_file(directory: Path, name: str, remedy: str) -> Path:
    """Like ``regular_file``, where a missing file is a CheckpointError that ends in ``remedy``."""
    path = regular_file(directory, name)
    if path is None:
        raise CheckpointError(f"{directory} has no {name}; {remedy}")
    return path


def map_file(path: Path) -> memoryview:
    """The file's bytes, memory-mapped read-only; they stay valid as long as anything uses them."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # mmap can't map nothing
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is no JSON object, or larger than ``MAX_JSON_BYTES``.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read.")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``text``, which must be UTF-8 and must not repeat a key.

    Raises:
        CheckpointError: it isn't; the message begins with ``where``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise CheckpointError(f"{where}: the key {twice!r} appears twice.")
        return entries

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise CheckpointError(f"{where} isn't valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_index(path: Path) -> dict[str, list[str]]:
    """The tensor names in each shard, from a ``*.index.json``: {"weight_map": {tensor: shard}}.

    Raises:
        CheckpointError: there is no such map.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a map from tensor to file under 'weight_map'.")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path}: the file of {tensor!r} must be a string.")
        shards.setdefault(shard, []).append(tensor)
    return shards


def preview(names: list[str], limit: int = 5) -> str:
    """The first few names, shortened, for a message."""
    shown = [name if len(name) <= 100 else name[:100] + "..." for name in names[:limit]]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown) + more


def first_line(error: Exception) -> str:
    """What another library's exception says, short enough for the middle of a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
