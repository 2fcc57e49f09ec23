"""The server's flags, and the other places that they may come from.

A flag on the command line beats the environment, which beats the YAML file of ``--config``, which
beats the default. The environment and the file are turned into words of the command line, so that
there is one parser and one kind of error.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionYesNo, Namespace

from jaxserve.cli import flags
from jaxserve.cli.flags import Parser, UsageError, flag_of
from jaxserve.compat import SERVER_FIXED, SERVER_NO_OPS, SHORT, SWITCHES, foreign_flags
from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from server.config import ServerConfig

ALSO = ("skip_tokenizer_init", "seed")
"""Fields of EngineConfig that commands with sampling flags hide."""
PREFIX = "JAXSERVE_"
NAMES = {
    "api_keys": ("--api-key",),
    "log_level": ("--log-level", "--uvicorn-log-level"),
    "queue_timeout_s": ("--queue-timeout",),
    "read_timeout_s": ("--read-timeout",),
    "write_timeout_s": ("--write-timeout",),
    "keep_alive_s": ("--keep-alive",),
    "stream_ping_s": ("--stream-ping",),
    "step_timeout_s": ("--step-timeout",),
    "shutdown_timeout_s": ("--shutdown-timeout",),
}
"""Fields of ServerConfig whose flags have another name."""
SECRETS = ("api_keys",)
GROUPS = {
    "listening": ("host", "port", "uds", "ssl_", "root_path", "api_server_count"),
    "access": ("api_keys", "allow", "trust_", "middleware"),
    "limits": ("max_", "_timeout_s", "keep_alive_s", "stream_ping_s"),
}
"""Where the help shows a field of ServerConfig, by a part of its name; the rest is "replies"."""
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def add_flags(parser: Parser) -> None:
    """The model's, the engine's and the server's flags, and vLLM's that have no effect here."""
    from server.config import ServerConfig

    flags.add_model(parser)
    text = "show all settings as YAML for --config, and exit"
    parser.add_argument("--print-config", action="store_true", help=text)
    names = [field.name for field in dataclasses.fields(ServerConfig)]
    for title in (*GROUPS, "replies and logs"):
        hidden = [name for name in names if group_of(name) != title]
        flags.add_fields(parser.add_argument_group(title), ServerConfig, hidden, True, NAMES)
    flags.add_engine_flags(parser, also=ALSO)
    add_foreign_flags(parser)


def group_of(name: str) -> str:
    """The title below which the help shows a field of ServerConfig."""
    if name == "max_log_len":
        return "replies and logs"
    for title, parts in GROUPS.items():
        if any(part in name for part in parts):
            return title
    return "replies and logs"


def add_foreign_flags(parser: Parser) -> None:
    """vLLM's other flags, which the help doesn't show."""
    for name in (*SERVER_NO_OPS, *SERVER_FIXED):
        words = [flag_of(name), *([SHORT[name]] if name in SHORT else [])]
        if name in SWITCHES:
            options: dict[str, Any] = {"action": ActionYesNo(no_prefix="no-")}
        else:
            options = {"type": Any}
        parser.add_argument(*words, default=None, help=argparse.SUPPRESS, **options)


# --- The environment and the YAML file ------------------------------------------------------------


def arrange(parser: Parser, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The words of a command line, with what the environment and ``--config`` add put before them.

    Raises:
        UsageError: the file can't be read, or has a setting that there isn't; a switch in the
            environment is neither yes nor no.
    """
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    rest, config = _take_config(_join_lists(_undot(words)), environ)
    given = {actions[flag].dest for word in rest if (flag := word.partition("=")[0]) in actions}
    has_model = "model" in given or (bool(rest) and not rest[0].startswith("-"))
    given |= {"help", "config"} | ({"model"} if has_model else set())
    added: list[str] = []
    for flag, action in actions.items():
        name = PREFIX + flag[2:].replace("-", "_").upper()
        if flag.startswith("--") and action.dest not in given and environ.get(name):
            given.add(action.dest)
            added += _words(flag, action, environ[name], name)
    for key, value in _read(config).items():
        flag = flag_of(str(key))
        if flag not in actions:
            near = difflib.get_close_matches(flag, actions, n=1)
            hint = f"; did you mean {near[0][2:]}?" if near else ""
            raise UsageError(f"{config}: there is no setting {key!r}{hint}")
        if actions[flag].dest not in given and value is not None:
            added += _words(flag, actions[flag], value, f"{config}: {key}")
    return [*added, *rest]


def misspelt(parser: Parser, environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that looks like the twin of a flag, but isn't."""
    known = [PREFIX + flag[2:].replace("-", "_").upper() for flag in parser._option_string_actions]
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                yield f"{name} in the environment has no effect; did you mean {near[0]}?"


def _undot(words: Sequence[str]) -> list[str]:
    """--structured-outputs-config.backend as --structured-outputs-config: it has no effect."""
    undotted = []
    for word in words:
        base, dot, _ = word.partition("=")[0].partition(".")
        name = base[2:].replace("-", "_")
        if dot and word.startswith("--") and (name in SERVER_NO_OPS or name in SERVER_FIXED):
            word = base + ("=" + word.partition("=")[2] if "=" in word else "")
        undotted.append(word)
    return undotted


def _join_lists(words: Sequence[str]) -> list[str]:
    """``--served-model-name a b`` as two flags, once the MODEL has been named."""
    joined: list[str] = []
    flag = None
    for word in words:
        if word.startswith("-"):
            flag = word if word in ("--served-model-name", "--lora-modules") else None
        elif flag is not None and joined[-1] != flag and _names_a_model(words):
            joined.append(flag)
        joined.append(word)
    return joined


def _names_a_model(words: Sequence[str]) -> bool:
    return not words[0].startswith("-") or any(w.partition("=")[0] == "--model" for w in words)


def _take_config(words: list[str], environ: Mapping[str, str]) -> tuple[list[str], str | None]:
    """(the words without --config FILE, the file)."""
    file = environ.get(PREFIX + "CONFIG") or None
    rest = []
    following = iter(words)
    for word in following:
        name, equals, value = word.partition("=")
        if name == "--config":
            file = value if equals else next(following, "")
        else:
            rest.append(word)
    return rest, file


def _read(file: str | None) -> dict[Any, Any]:
    if file is None:
        return {}
    import yaml

    try:
        settings = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file or 'the file of --config'} can't be read: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file} must hold settings, like max-model-len: 8192")
    return settings


def _words(flag: str, action: Any, value: Any, source: str) -> list[str]:
    """The words that give a flag a value."""
    if isinstance(action, ActionYesNo) or action.nargs == 0:
        text = str(value).lower()
        if text not in (*YES, *NO):
            raise UsageError(f"{source} must be true or false, got {value!r}")
        if text in NO and not isinstance(action, ActionYesNo):
            return []
        yes = text in YES
        return [flag if yes == (not flag.startswith("--no-")) else flag.replace("--", "--no-", 1)]
    if type(action).__name__ == "_AppendAction":
        values = value.split(",") if isinstance(value, str) and source.startswith(PREFIX) else value
        values = values if isinstance(values, list) else [values]
        return [f"{flag}={str(one).strip()}" for one in values]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict | list) else value}"]


# --- What the flags mean --------------------------------------------------------------------------


def configs(args: Namespace) -> tuple[EngineConfig, ServerConfig]:
    """What the flags say; prints a line for each of vLLM's that have no effect.

    Raises:
        UsageError: a value is wrong, or isn't supported.
    """
    from server.config import ServerConfig

    foreign = {name: args[name] for name in (*SERVER_NO_OPS, *SERVER_FIXED)}
    engine = flags.engine_arguments(args, also=ALSO)
    # The word is on the command line; the flag may come from the environment.
    engine["model"] = args.model_word or args.model
    try:
        for line in foreign_flags(foreign):
            print(line, file=sys.stderr)
        return EngineConfig(**engine), ServerConfig(**server_arguments(args))
    except ValueError as error:
        raise UsageError(str(error)) from None


def server_arguments(args: Namespace) -> dict[str, Any]:
    """The fields of ServerConfig that the flags set."""
    from server.config import ServerConfig

    names = [field.name for field in dataclasses.fields(ServerConfig)]
    values = {name: args[name] for name in names if name in args}
    # vLLM's lists of origins, methods and headers are JSON.
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        if values.get(name) is not None:
            values[name] = [one for word in values[name] for one in _listed(name, word)]
    return {name: value for name, value in values.items() if value is not None}


def _listed(name: str, word: str) -> list[str]:
    if not word.startswith("["):
        return [word]
    try:
        return [str(one) for one in json.loads(word)]
    except ValueError as error:
        raise UsageError(f"{flag_of(name)} {word!r} is no JSON list: {error}") from None


def changed(engine: EngineConfig, server: ServerConfig) -> dict[str, Any]:
    """The settings that aren't at their defaults, by the names of their flags; no secrets."""
    shown = {}
    for config in (engine, server):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != field.default:
                name = NAMES.get(field.name, (flag_of(field.name),))[0][2:]
                shown[name] = "(not shown)" if field.name in SECRETS else value
    return shown


def as_yaml(engine: EngineConfig, server: ServerConfig) -> str:
    """All settings as a file for ``--config``; the keys stand there only as a comment."""
    import yaml

    settings = {}
    for config in (engine, server):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            name = NAMES.get(field.name, (flag_of(field.name),))[0][2:]
            if field.name not in SECRETS:
                settings[name] = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    count = len(server.api_keys)
    return text + (f"# api-key: {count} given, not shown\n" if count else "")
