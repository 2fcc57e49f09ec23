"""``jaxserve cache``: files of compiled programs, listed, trimmed, and moved safely."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from jaxserve.__main__ import main
from jaxserve.cli import cache_files
from jaxserve.cli.cache import WARNING, _age, _parse, _size
from jaxserve.cli.cache_files import ArchiveError, Entry, entries, pack, surplus, unpack

DAY = 86400.0
HERE = {"jax": "1.2", "jaxlib": "1.2", "device": "a GPU", "host": "Linux x86_64"}


def add(directory: Path, name: str, content: bytes, days: float = 0.0) -> None:
    """A file that was used so many days ago."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    used = time.time() - days * DAY
    os.utime(path, (used, used))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three entries, one in a folder of XLA's; and what is none."""
    directory = tmp_path / "cache"
    add(directory, "jit_new-0123-cache", b"n" * 100, days=1)
    add(directory, "jit_old-4567-cache", b"o" * 300, days=40)
    add(directory, "xla/tuned.pb", b"t" * 50, days=10)
    add(directory, ".lockfile", b"")
    (directory / "link-cache").symlink_to(directory / "jit_new-0123-cache")
    return directory


def names(directory: Path) -> list[str]:
    return [entry.name for entry in entries(directory)]


NAMES = ["jit_new-0123-cache", "xla/tuned.pb", "jit_old-4567-cache"]


def run(*words: str) -> int:
    """The command; wrong command lines end it."""
    try:
        return main(["cache", *words])
    except SystemExit as end:
        return int(end.code or 0)


# --- ls and prune ---------------------------------------------------------------------------------


def test_entries_come_last_used_first(cache: Path) -> None:
    found = entries(cache)
    assert [entry.name for entry in found] == NAMES
    assert [entry.size for entry in found] == [100, 50, 300]


def test_jaxs_own_notes_of_use_count(cache: Path) -> None:
    """JAX writes them when it limits the cache's size itself."""
    now = time.time_ns().to_bytes(8, "little")
    (cache / "jit_old-4567-atime").write_bytes(now)
    assert names(cache) == [NAMES[2], *NAMES[:2]]
    cache_files.delete(cache, entries(cache)[:1])
    assert not (cache / "jit_old-4567-atime").exists()


def test_ls_shows_sizes_ages_and_the_total(cache: Path, capsys) -> None:
    assert run("ls", "--compilation-cache-dir", str(cache), "--limit", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["100", "B", "24", "h", "jit_new-0123-cache"]
    assert lines[1].split() == ["50", "B", "10", "d", "xla/tuned.pb"]
    assert lines[2:] == ["... and 1 more", f"{cache}: 3 entries, 450 B"]


def entry(name: str, size: int, used: float) -> Entry:
    return Entry(name, size, used)


FOUND = [entry("a", 5, 30.0), entry("b", 4, 20.0), entry("c", 1, 10.0)]


@pytest.mark.parametrize(
    ("max_size", "used_before", "gone"),
    [
        (10, None, ""),
        (9, None, "c"),
        (8, None, "bc"),  # c would fit, but b is newer and had to go
        (0, None, "abc"),
        (None, 15.0, "c"),
        (None, 31.0, "abc"),
        (5, 15.0, "bc"),
    ],
)
def test_what_was_used_last_stays(
    max_size: float | None, used_before: float | None, gone: str
) -> None:
    for found in (FOUND, FOUND[::-1]):
        assert {each.name for each in surplus(found, max_size, used_before)} == set(gone)


def test_prune_deletes_what_is_old_and_what_is_too_much(cache: Path, capsys) -> None:
    where = ("--compilation-cache-dir", str(cache))
    assert run("prune", *where, "--older-than", "30d", "--dry-run") == 0
    assert names(cache) == NAMES
    assert run("prune", *where, "--older-than", "30d") == 0
    assert names(cache) == NAMES[:2]
    assert run("prune", *where, "--max-size", "0.1kB") == 0
    assert names(cache) == NAMES[:1]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"would delete 1 entry, 300 B; 2 entries, 150 B stay in {cache}"
    assert out[1].startswith("deleted 1 entry, 300 B; 2 entries")
    assert (cache / ".lockfile").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command: ls, prune, pack, unpack"),
        (["prune"], "give --max-size, --older-than or both"),
        (["prune", "--max-size", "5 apples"], "--max-size '5 apples' must be a number with a unit"),
        (["prune", "--older-than", "soon"], "--older-than 'soon' must be a number with a unit"),
        (["pack"], "required: archive"),
    ],
)
def test_a_wrong_command_line_gets_one_clear_line(words: list[str], message: str, capsys) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_sizes_and_times_are_read_and_written() -> None:
    from jaxserve.cli.cache import SIZE_UNITS, TIME_UNITS

    assert _parse("f", "5GB", SIZE_UNITS) == 5e9
    assert _parse("f", "1.5 GiB", SIZE_UNITS) == 1.5 * 2**30
    assert _parse("f", "700", SIZE_UNITS) == 700
    assert _parse("f", "2w", TIME_UNITS) == 14 * DAY
    assert [_size(n) for n in (0, 999, 1500, 2_500_000, 5e9)] == [
        *("0 B", "999 B", "1.5 kB", "2.5 MB", "5.00 GB")
    ]
    assert [_age(s) for s in (-1, 5, 600, 3 * 3600, 3 * DAY, 30 * DAY)] == [
        *("0 s", "5 s", "10 m", "3 h", "3 d", "4 w")
    ]


def test_help_warns_that_programs_are_code(capsys) -> None:
    for words in (["--help"], ["unpack", "--help"]):
        assert run(*words) == 0
        assert WARNING in " ".join(capsys.readouterr().out.split())


# --- pack and unpack ------------------------------------------------------------------------------


def test_what_is_packed_can_be_unpacked_elsewhere(cache: Path, tmp_path: Path) -> None:
    archive, there = tmp_path / "out" / "c.tar", tmp_path / "there"
    pack(archive, cache, entries(cache), HERE)
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["manifest.json", *NAMES]
    assert all(member.isreg() and member.uid == 0 and not member.uname for member in members)
    assert [path.name for path in archive.parent.iterdir()] == ["c.tar"]

    assert unpack(archive, there / "new", HERE) == (3, 0)
    assert (there / "new").stat().st_mode & 0o077 == 0
    (there / "new").rename(tmp_path / "moved")
    add(there, "jit_new-0123-cache", b"ours")
    assert unpack(archive, there, HERE) == (2, 1)
    assert sorted(names(there)) == sorted(NAMES)
    assert (there / "jit_new-0123-cache").read_bytes() == b"ours"
    assert (there / "xla" / "tuned.pb").read_bytes() == b"t" * 50
    assert (there / "xla" / "tuned.pb").stat().st_mode & 0o077 == 0
    assert not list(there.rglob(".tmp*"))


@pytest.mark.parametrize("name", HERE)
def test_another_machine_refuses_unless_forced(name: str, cache: Path, tmp_path: Path) -> None:
    archive, there = tmp_path / "c.tar", tmp_path / "there"
    pack(archive, cache, entries(cache), HERE | {name: "other"})
    with pytest.raises(ArchiveError, match=f"{name} other there, {HERE[name]} here.*--force"):
        unpack(archive, there, HERE)
    assert not there.exists()
    assert unpack(archive, there, None) == (3, 0)


def make_archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], listed: bool = True) -> None:
    """An archive with a good manifest and any members."""
    hashes = {info.name: hashlib.sha256(content).hexdigest() for info, content in members}
    manifest = {"format": 1, "machine": HERE, "sha256": hashes if listed else {}}
    content = json.dumps(manifest).encode()
    info = tarfile.TarInfo("manifest.json")
    info.size = len(content)
    with tarfile.open(path, "w") as tar:
        tar.addfile(info, io.BytesIO(content))
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("/tmp/evil"),
        member("../evil"),
        member("xla/../../evil"),
        member(".hidden"),
        member("a\\b"),
        member("C:evil"),
        member("./evil"),
        member("evil", tarfile.SYMTYPE, "/etc/passwd"),
        member("evil", tarfile.LNKTYPE, "good-cache"),
        member("evil", tarfile.DIRTYPE),
        member("evil", tarfile.FIFOTYPE),
        member("evil", tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)
def test_nothing_is_written_if_one_member_is_unsafe(bad: tarfile.TarInfo, tmp_path: Path) -> None:
    archive, there = tmp_path / "c.tar", tmp_path / "in" / "there"
    make_archive(archive, (member("good-cache"), b"good"), (bad, b""))
    for here in (HERE, None):  # --force doesn't make it safe
        with pytest.raises(ArchiveError, match="no plain file inside"):
            unpack(archive, there, here)
    assert sorted(tmp_path.rglob("*")) == [archive]


def test_members_that_the_manifest_does_not_know_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "c.tar"
    make_archive(archive, (member("x-cache"), b"x"), listed=False)
    with pytest.raises(ArchiveError, match="'x-cache' is missing in the archive's manifest"):
        unpack(archive, tmp_path / "there", HERE)


def test_a_damaged_file_is_not_written(cache: Path, tmp_path: Path) -> None:
    archive, there = tmp_path / "c.tar", tmp_path / "there"
    pack(archive, cache, entries(cache), HERE)
    archive.write_bytes(archive.read_bytes().replace(b"n" * 100, b"N" * 100))
    with pytest.raises(ArchiveError, match=r"jit_new-0123-cache.*damaged"):
        unpack(archive, there, HERE)
    assert not there.exists() or not any(there.iterdir())


@pytest.mark.parametrize("content", [b"", b"no archive" * 100])
def test_what_is_no_archive_of_ours_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    path.write_bytes(content)
    with pytest.raises(ArchiveError):
        unpack(path, tmp_path / "there", HERE)
    with tarfile.open(path, "w") as tar:
        tar.addfile(member("x-cache"), io.BytesIO(b""))
    with pytest.raises(ArchiveError, match="no archive that cache pack"):
        unpack(path, tmp_path / "there", HERE)


def test_the_commands_move_a_cache_on_this_machine(cache: Path, tmp_path: Path, capsys) -> None:
    archive, there = str(tmp_path / "c.tar"), str(tmp_path / "there")
    assert run("pack", archive, "--compilation-cache-dir", str(cache)) == 0
    assert run("unpack", archive, "--compilation-cache-dir", there) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{archive}: 3 entries, 450 B", f"{there}: 3 added, 0 were there already"]
    assert run("pack", archive, "--compilation-cache-dir", str(tmp_path / "empty")) == 2
    assert "nothing to pack" in capsys.readouterr().err
    assert run("unpack", str(tmp_path / "none.tar"), "--compilation-cache-dir", there) == 1
    assert "none.tar can't be unpacked" in capsys.readouterr().err


def test_the_manifest_says_what_jax_compares() -> None:
    import jax

    machine = cache_files.machine()
    assert set(machine) == set(HERE)
    assert machine["jax"] == jax.__version__ and machine["device"]
