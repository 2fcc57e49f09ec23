"""Flags made from the dataclasses that they fill, so that names and help are written once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace

from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.sampling.params import SamplingParams

ENGINE_HIDDEN = {"model", "skip_tokenizer_init", "seed"}
"""Fields of EngineConfig that are no flags; --seed is the request's."""
SAMPLING_HIDDEN = {
    *("n", "logprobs", "prompt_logprobs", "detokenize", "spaces_between_special_tokens"),
    *("logit_bias", "allowed_token_ids", "bad_words_token_ids"),
}
"""Fields of SamplingParams that mean nothing on a terminal."""
SHORT = {"tensor_parallel_size": "-tp"}
SIZES = {"max_model_len", "max_num_batched_tokens"}
"""Fields whose flags understand 8k and 8K, and auto for None."""
Names = Mapping[str, Sequence[str]]
METAVARS = {int: "N", float: "X", str: "TEXT", dict[str, str]: "JSON"}


class Formatter(DefaultHelpFormatter):
    """Help that gives a default only where there is one, and no Python types."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30} | options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, ActionYesNo) and not action.default:
            return action.option_strings[0]  # the way to say no is clear, and rarely needed
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default is not None and action.default is not argparse.SUPPRESS
        switch = isinstance(action.default, bool) and not action.default
        if action.option_strings and shown and not switch and "default" not in text:
            return f"{text} [default: %(default)s]"
        return text


class Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line; both spellings of flags are understood."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", Formatter)
        kwargs.setdefault("print_config", None)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line and exits with code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        missing = re.match(r"expected \"((?:\w+\.)*)command\" to be one of", message)
        if missing:
            for name in missing[1].split(".")[:-1]:
                parser = parser._commands()[name]
            line = f"give a command: {', '.join(parser._commands())}"
        else:
            line = _readable(message) + parser._suggestion(message)
        print(f"{parser.prog}: {line} (see {parser.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _commands(self) -> dict[str, Parser]:
        action = self._subcommands_action
        return {} if action is None else action._name_parser_map

    def _suggestion(self, message: str) -> str:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message.lower())
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[1], flags, n=1) if unknown else []
        return f"; did you mean {near[0]}?" if near else ""


def _readable(message: str) -> str:
    """jsonargparse's messages without Python's type names, on one line."""
    pattern = r"Parser key \"([\w.]+)\":\s+Expected an? <class '(\w+)'>\. Got value: (.*)"
    wrong = re.match(pattern, message, re.DOTALL)
    if wrong:
        kind = {"int": "an integer", "float": "a number"}.get(wrong[2], wrong[2])
        return f"{flag_of(wrong[1].rpartition('.')[2])} must be {kind}, got {wrong[3]!r}"
    message = re.sub(r"^argument (--[\w-]+): must be", r"\1 must be", message)
    message = re.sub(r"(?<=required: ).*", lambda m: re.sub(r"(\w+\.)+", "", m[0]), message)
    return " ".join(message.split())


def flag_of(name: str) -> str:
    """--max-model-len for max_model_len."""
    return "--" + name.replace("_", "-")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """The command line with --max_model_len written --max-model-len."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    for index, word in enumerate(words[:end]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words[index] = name.replace("_", "-") + equals + value
    return words


def summaries(cls: type) -> dict[str, str]:
    """What the "Attributes" section of a dataclass says about each field."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("``", "") for name, text in entries}


def add_commands(parser: ArgumentParser, prog: str, commands: Mapping[str, Any]) -> None:
    """Subcommands: modules with HELP, make_parser() and run(args), and COMMANDS if they have
    subcommands of their own."""
    adding = parser.add_subcommands(
        dest="command", metavar="COMMAND", title="commands", description=None
    )
    for name, command in commands.items():
        subparser = command.make_parser()
        adding.add_subcommand(name, subparser, help=command.HELP)
        subparser.prog = f"{prog} {name}"
        if hasattr(command, "COMMANDS"):
            add_commands(subparser, subparser.prog, command.COMMANDS)


def add_model(parser: ArgumentParser, positional: bool = True) -> None:
    """The model, as a word or a flag."""
    text = "a directory (Hugging Face or Orbax) or a hub id; the embedded demo model by default"
    if positional:
        parser.add_argument("model_word", metavar="MODEL", nargs="?", type=str, help=text)
    text = "the same as a flag" if positional else text
    parser.add_argument("--model", metavar="MODEL", type=str, help=text)
    parser.add_argument("--config", action="config", metavar="FILE", help="flags from a YAML file")


def add_engine_flags(parser: ArgumentParser, also: Collection[str] = ()) -> None:
    """A flag for each field of EngineConfig; ``also`` names hidden ones to show."""
    group = parser.add_argument_group("engine")
    add_fields(group, EngineConfig, ENGINE_HIDDEN.difference(also), own_defaults=True)


def add_sampling_flags(parser: ArgumentParser, max_tokens: int | None) -> None:
    """A flag for each field of SamplingParams; without them the model's own defaults hold."""
    group = parser.add_argument_group(
        "sampling", "By default as the model's generation_config.json says."
    )
    add_fields(group, SamplingParams, SAMPLING_HIDDEN, own_defaults=False)
    parser.set_defaults(max_tokens=max_tokens)


def add_fields(
    group: Any, cls: type, hidden: Collection[str], own_defaults: bool, names: Names | None = None
) -> None:
    """A flag for each field of a dataclass that its docstring describes.

    Args:
        group: to add them to.
        cls: the dataclass.
        hidden: fields that get no flag.
        own_defaults: the fields' defaults are the flags'; otherwise None, which means "not given".
        names: field -> its flags, where it isn't the field's name with dashes.
    """
    texts, hints = summaries(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in hidden or field.name not in texts:
            continue
        kind, many = _kind(hints[field.name])
        options: dict[str, Any] = {
            "help": texts[field.name].rstrip("."),
            "default": field.default if own_defaults else None,
            "dest": field.name,
        }
        if kind is bool:
            options["action"] = ActionYesNo(no_prefix="no-")
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
            options["metavar"] = "NAME"
        else:
            options |= {"type": size if field.name in SIZES else kind, "metavar": METAVARS[kind]}
            if many:
                options |= {"action": "append", "help": options["help"] + "; may be repeated"}
                options["type"] = integer if kind is int else kind
                if own_defaults and isinstance(field.default, tuple) and field.default:
                    options["help"] += f" [default: {' '.join(field.default)}]"
                options["default"] = None
        short = [SHORT[field.name]] if field.name in SHORT else []
        group.add_argument(*(names or {}).get(field.name, (flag_of(field.name), *short)), **options)


def size(value: Any) -> int | None:
    """A number of tokens: 8192, 8k (8000), 8K (8192), or None for "auto" and -1, vLLM's words."""
    if value in ("auto", "-1", -1):
        return None
    words = re.fullmatch(r"(\d+)([kKmM]?)", str(value))
    if not words:
        hint = "(8k is 8000, 8K is 8192, auto is what fits)"
        raise argparse.ArgumentTypeError(f"must be an integer, got {str(value)!r} {hint}")
    units = {"": 1, "k": 1000, "K": 2**10, "m": 1000**2, "M": 2**20}
    return int(words[1]) * units[words[2]]


def integer(value: Any) -> Any:
    """int(), also of a list: jsonargparse checks repeated flags one by one, then all together."""
    return [int(one) for one in value] if isinstance(value, list) else int(value)


def _kind(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether there may be several) of a field's annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        many = any(get_origin(part) in (list, tuple) for part in parts)
        return (get_args(parts[-1])[0] if many else parts[0]), many
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def engine_arguments(args: Namespace, also: Collection[str] = ()) -> dict[str, Any]:
    """The keyword arguments of LLM, from the flags that ``add_engine_flags`` made."""
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    hidden = ENGINE_HIDDEN.difference(also)
    values = {name: args[name] for name in names if name not in hidden}
    model = args.model or args.get("model_word")
    _check(EngineConfig, model=model, **values)
    return {"model": model, **values}


def sampling_arguments(args: Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that the flags set."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    given = {name: args[name] for name in names if name not in SAMPLING_HIDDEN}
    given = {name: value for name, value in given.items() if value is not None}
    _check(SamplingParams, **given)
    return given


def _check(cls: type, **values: Any) -> None:
    """Refuses bad values before anything slow is imported."""
    try:
        cls(**values)
    except JaxserveError as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def server_extra() -> Iterator[None]:
    """Says what to install where an import inside fails for want of the extra "server"."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f'this needs {error.name}: pip install "jaxserve[server]" '
            '(from a checkout: pip install ".[server]")'
        ) from None


class UsageError(JaxserveError):
    """The command line asks for something that there isn't; the exit code is 2."""
