"""The files of JAX's persistent compile cache: what there is, what may go, and archives of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.files import written_whole

MANIFEST = "manifest.json"
FORMAT = 1
USED_SUFFIX = "-atime"
"""JAX may keep a file beside ``x-cache`` that says when it was used last: ``x-atime``."""


class ArchiveError(JaxserveError):
    """An archive can't be read, isn't safe to unpack, or is of another machine."""


@dataclass(frozen=True)
class Entry:
    """One file of the cache.

    Attributes:
        name: its path below the cache, with slashes.
        size: in bytes.
        used: when it was read or written last, in seconds since 1970, as far as that is known.
    """

    name: str
    size: int
    used: float


def entries(directory: Path) -> list[Entry]:
    """The files of a cache, last used first; subfolders hold XLA's own caches."""
    found = []
    for path in directory.rglob("*"):
        # Another process may delete files at the same time.
        with contextlib.suppress(FileNotFoundError):
            relative = path.relative_to(directory).as_posix()
            hidden = any(part.startswith(".") for part in relative.split("/"))
            if hidden or path.is_symlink() or not path.is_file() or _notes_use(path):
                continue
            stat = path.stat()
            used = max(stat.st_mtime, stat.st_atime, _noted_use(path))
            found.append(Entry(relative, stat.st_size, used))
    return sorted(found, key=lambda entry: (-entry.used, entry.name))


def _notes_use(path: Path) -> bool:
    return path.name.endswith(USED_SUFFIX)


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix("-cache") + USED_SUFFIX)


def _noted_use(path: Path) -> float:
    try:
        return int.from_bytes(_beside(path).read_bytes(), "little") / 1e9
    except FileNotFoundError:
        return 0.0


def surplus(
    found: Sequence[Entry], max_size: float | None, used_before: float | None
) -> list[Entry]:
    """What has to go.

    Args:
        found: all entries.
        max_size: bytes that may stay; those used last stay.
        used_before: a time; what was used last before it goes.
    """
    old, size = [], 0
    for entry in sorted(found, key=lambda entry: -entry.used):
        size += entry.size
        stale = used_before is not None and entry.used < used_before
        if stale or (max_size is not None and size > max_size):
            old.append(entry)
    return old


def delete(directory: Path, old: Sequence[Entry]) -> None:
    """Deletes entries; programs that run already keep theirs."""
    for entry in old:
        path = directory / entry.name
        path.unlink(missing_ok=True)
        _beside(path).unlink(missing_ok=True)


def machine() -> dict[str, str]:
    """What must agree for JAX to find programs of another machine."""
    # Else JAX takes most of the memory of a GPU that somebody may be using.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jaxlib.version

    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "device": jax.local_devices()[0].device_kind,
        "host": f"{platform.system()} {platform.machine()}",
    }


def pack(archive: Path, directory: Path, found: Sequence[Entry], versions: dict[str, str]) -> None:
    """Writes an archive: a manifest, then the entries under relative names, nobody's and undated.

    The archive appears when it is complete.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    contents = {}
    for entry in found:
        with contextlib.suppress(FileNotFoundError):
            contents[entry.name] = hashlib.sha256((directory / entry.name).read_bytes()).hexdigest()
    manifest = {"format": FORMAT, "machine": versions, "sha256": contents}
    with written_whole(archive) as file, tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, MANIFEST, json.dumps(manifest, indent=2).encode())
        for name in contents:
            _add(tar, name, (directory / name).read_bytes())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o600, int(time.time())
    tar.addfile(info, io.BytesIO(content))


def unpack(archive: Path, directory: Path, here: dict[str, str] | None) -> tuple[int, int]:
    """Adds an archive's entries to a cache; those that are there already stay as they are.

    Nothing is written before all names are found safe: plain files with relative paths that stay
    inside, each listed in the manifest with its hash.

    Args:
        archive: what ``pack`` wrote.
        directory: the cache.
        here: this machine, which must agree with the archive's; None takes any.

    Returns:
        How many entries were added, and how many were there.

    Raises:
        ArchiveError: see the class.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            manifest = _manifest(tar, members)
            if here is not None:
                _check_machine(manifest["machine"], here)
            for member in members[1:]:
                _check_member(member, manifest["sha256"])
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            added = [_extract(tar, member, directory, manifest) for member in members[1:]]
    except (OSError, tarfile.TarError) as error:
        raise ArchiveError(f"{archive} can't be unpacked: {error}") from error
    return sum(added), len(added) - sum(added)


def _manifest(tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo]) -> dict[str, Any]:
    file = None
    if members and members[0].name == MANIFEST and members[0].isreg():
        file = tar.extractfile(members[0])
    try:
        manifest = json.loads(file.read()) if file is not None else {}
        if manifest.get("format") == FORMAT:
            return {"machine": dict(manifest["machine"]), "sha256": dict(manifest["sha256"])}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ArchiveError(f"{tar.name!r} is no archive that cache pack of this version made.")


def _check_machine(there: dict[str, Any], here: dict[str, str]) -> None:
    differences = [
        f"{name} {there.get(name)} there, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if differences:
        raise ArchiveError(
            f"the archive is of another machine ({'; '.join(differences)}), so JAX would find none "
            "of its programs; --force unpacks it all the same."
        )


def _check_member(member: tarfile.TarInfo, hashes: dict[str, Any]) -> None:
    path = PurePosixPath(member.name)
    hidden = any(part.startswith(".") for part in path.parts)  # ".." too
    unsafe = path.is_absolute() or hidden or "\\" in member.name or ":" in member.name
    if unsafe or not member.isreg() or str(path) != member.name:
        raise ArchiveError(f"{member.name!r} is no plain file inside of the archive.")
    if member.name not in hashes:
        raise ArchiveError(f"{member.name!r} is missing in the archive's manifest.")


def _extract(
    tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path, manifest: dict[str, Any]
) -> bool:
    """Writes one file in one go; False if it is there already."""
    target = directory / member.name
    if target.exists():
        return False
    file = tar.extractfile(member)
    content = file.read() if file is not None else b""
    if hashlib.sha256(content).hexdigest() != manifest["sha256"][member.name]:
        raise ArchiveError(f"{member.name!r} isn't what the manifest says; the archive is damaged.")
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with written_whole(target) as new:
        new.write(content)
    return True
