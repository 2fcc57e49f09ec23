"""``jaxserve cache``: the folder of compiled programs, listed, trimmed and moved."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace

from jaxserve.cli import cache_files
from jaxserve.cli.cache_files import Entry
from jaxserve.cli.flags import Parser, UsageError

HELP = "list, trim, pack and unpack the compiled programs that are kept between runs"
WARNING = (
    "Compiled programs are code: whoever can write to the cache, or made an archive that you "
    "unpack, can run anything as you."
)
SIZE_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SIZE_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Command(NamedTuple):
    """A subcommand that is no module."""

    HELP: str
    make_parser: Callable[[], Parser]
    run: Callable[[Namespace], int]


def make_parser() -> Parser:
    """The flags of the command."""
    return Parser(
        usage="jaxserve cache COMMAND [options]",
        description=f"The persistent cache of compiled programs. {WARNING}",
    )


def run(args: Namespace) -> int:
    """Runs the subcommand."""
    return COMMANDS[args.command].run(args[args.command])


def _parser(usage: str, description: str) -> Parser:
    parser = Parser(usage=f"jaxserve cache {usage}", description=description)
    parser.add_argument(
        "--compilation-cache-dir",
        type=str,
        metavar="DIR",
        help="the cache, if not JAX_COMPILATION_CACHE_DIR or the one in the user's cache folder",
    )
    return parser


def _directory(args: Namespace) -> Path:
    from jaxserve.engine.programs import compilation_cache_path

    return compilation_cache_path(args.compilation_cache_dir)


# --- ls -------------------------------------------------------------------------------------------


def _ls_parser() -> Parser:
    parser = _parser("ls [options]", "Lists the compiled programs, those used last first.")
    text = "how many to show, at most; 0 shows only the total"
    parser.add_argument("--limit", type=int, default=40, metavar="N", help=text)
    return parser


def _ls(args: Namespace) -> int:
    directory = _directory(args)
    entries = cache_files.entries(directory)
    now = time.time()
    for entry in entries[: max(0, args.limit)]:
        print(f"{_size(entry.size):>10}  {_age(now - entry.used):>8}  {_short(entry.name)}")
    if len(entries) > args.limit > 0:
        print(f"... and {len(entries) - args.limit} more")
    print(f"{directory}: {_total(entries)}")
    return 0


# --- prune ----------------------------------------------------------------------------------------


def _prune_parser() -> Parser:
    parser = _parser(
        "prune [--max-size SIZE] [--older-than TIME]",
        "Deletes compiled programs, those not used for the longest time first. What is needed "
        "again is compiled again.",
    )
    add = parser.add_argument
    add("--max-size", type=str, metavar="SIZE", help="what may stay, for example 5GB or 500MiB")
    text = "delete what wasn't used for so long, for example 30d, 12h or 2w"
    add("--older-than", type=str, metavar="TIME", help=text)
    add("--dry-run", action="store_true", help="only say what would be deleted")
    return parser


def _prune(args: Namespace) -> int:
    if args.max_size is None and args.older_than is None:
        raise UsageError("give --max-size, --older-than or both.")
    size = None if args.max_size is None else _parse("--max-size", args.max_size, SIZE_UNITS)
    age = None if args.older_than is None else _parse("--older-than", args.older_than, TIME_UNITS)
    directory = _directory(args)
    before = cache_files.entries(directory)
    old = cache_files.surplus(before, size, None if age is None else time.time() - age)
    if not args.dry_run:
        cache_files.delete(directory, old)
    word = "would delete" if args.dry_run else "deleted"
    left = [entry for entry in before if entry not in old]
    print(f"{word} {_total(old)}; {_total(left)} stay in {directory}")
    return 0


# --- pack and unpack ------------------------------------------------------------------------------


def _pack_parser() -> Parser:
    parser = _parser(
        "pack OUT.tar [options]",
        "Puts all compiled programs into an archive, to start quickly on another machine with "
        "the same device and the same versions.",
    )
    parser.add_argument("archive", metavar="OUT.tar", type=str, help="the archive to make")
    return parser


def _pack(args: Namespace) -> int:
    directory = _directory(args)
    entries = cache_files.entries(directory)
    if not entries:
        raise UsageError(f"{directory} is empty; there is nothing to pack.")
    cache_files.pack(Path(args.archive), directory, entries, cache_files.machine())
    print(f"{args.archive}: {_total(entries)}")
    return 0


def _unpack_parser() -> Parser:
    parser = _parser("unpack IN.tar [options]", f"Adds an archive's programs. {WARNING}")
    parser.add_argument("archive", metavar="IN.tar", type=str, help="what cache pack made")
    text = "take programs of other versions or devices too; JAX won't find most of them"
    parser.add_argument("--force", action="store_true", help=text)
    return parser


def _unpack(args: Namespace) -> int:
    directory = _directory(args)
    here = None if args.force else cache_files.machine()
    added, there = cache_files.unpack(Path(args.archive), directory, here)
    print(f"{directory}: {added} added, {there} were there already")
    return 0


COMMANDS = {
    "ls": Command("list compiled programs", _ls_parser, _ls),
    "prune": Command("delete old ones, or the least used beyond a size", _prune_parser, _prune),
    "pack": Command("put them into an archive", _pack_parser, _pack),
    "unpack": Command("add those of an archive", _unpack_parser, _unpack),
}


# --- words ----------------------------------------------------------------------------------------


def _parse(flag: str, text: str, units: dict[str, int]) -> float:
    """A number with a unit, in bytes or seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in units:
        known = ", ".join(filter(None, units))
        raise UsageError(f"{flag} {text!r} must be a number with a unit ({known}).")
    return float(found[1]) * units[found[2]]


def _total(entries: list[Entry]) -> str:
    size = _size(sum(entry.size for entry in entries))
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size}"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _age(seconds: float) -> str:
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * TIME_UNITS[unit]:
            return f"{seconds / TIME_UNITS[unit]:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _short(name: str) -> str:
    """A name without most of its hash."""
    return re.sub(r"-([0-9a-f]{8})[0-9a-f]{24,}", r"-\1", name)
