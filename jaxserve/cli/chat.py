"""``jaxserve chat``: a conversation on the terminal, or with lines piped in."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.cli import complete_client, flags
from jaxserve.cli.flags import Parser, UsageError
from jaxserve.cli.turns import read_turns
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, InvalidRequestError, JaxserveError

if TYPE_CHECKING:
    from jaxserve.cli.chat_models import Model
    from jaxserve.cli.streaming import Answer

HELP = "chat with a model on the terminal"
KEYBOARD = """\
A backslash at the end of a line goes on with the next one; so does text between lines of \"\"\".
Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve chat [MODEL | --url URL] [options]",
        description="Chats with a model; /help lists the commands. With standard input from a "
        "file or a pipe, each line is a turn.",
    )
    flags.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", type=str, help="instructions to begin with")
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        type=str,
        help="Jinja that replaces the tokenizer's, or the name of a built-in one such as vicuna",
    )
    text = "chat with a model of a running server instead; with or without /v1"
    complete_client.add_flags(parser, text)
    flags.add_sampling_flags(parser, None)
    flags.add_engine_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Chats until the input ends."""
    sampling = flags.sampling_arguments(args)
    interactive = sys.stdin.isatty()
    with _local(args) if args.url is None else _served(args) as model:
        chat = Chat(model, sampling, args.system)
        if interactive:
            print(f"{model.greeting}\n/help lists the commands.")
        with contextlib.suppress(KeyboardInterrupt):  # at the prompt it means: leave
            for turn in read_turns(sys.stdin, interactive):
                if not chat.handle(turn):
                    break
    return 0 if interactive else int(chat.failed)


@contextlib.contextmanager
def _local(args: Namespace) -> Iterator[Model]:
    """A model in this process."""
    for name in ("api_key", "model_name"):
        if args[name] is not None:
            raise UsageError(f"{flags.flag_of(name)} needs --url.")
    engine = flags.engine_arguments(args)

    from jaxserve.cli.chat_models import LocalModel
    from jaxserve.llm import LLM

    with LLM(
        **engine,
        chat_template=args.chat_template,
        warmup="background",
        use_tqdm=sys.stderr.isatty(),
    ) as llm:
        if not llm.get_tokenizer().chat_template:
            raise ConfigError(
                f"{engine['model']} has no chat template, so it is probably not made for chatting. "
                "Use `jaxserve generate`, or pass --chat-template FILE or NAME."
            )
        yield LocalModel(llm, engine["model"])


@contextlib.contextmanager
def _served(args: Namespace) -> Iterator[Model]:
    """A server's model."""
    defaults = make_parser().get_defaults()
    mine = EngineConfig.__dataclass_fields__.keys() - flags.ENGINE_HIDDEN
    for name in ("model_word", "model", "chat_template", *sorted(mine)):
        if args[name] != defaults[name]:
            shown = "MODEL" if name == "model_word" else flags.flag_of(name)
            raise UsageError(f"{shown} has no meaning with --url: the server has its model loaded.")

    from jaxserve.cli.chat_models import ServedModel

    yield ServedModel(complete_client.Client(args.url, args.api_key), args.model_name)


class Chat:
    """One conversation and its settings.

    Args:
        model: answers.
        sampling: fields of SamplingParams that differ from the model's defaults.
        system: the system message, if any.

    Attributes:
        messages: the turns so far, without the system message.
        failed: whether any input was refused.
    """

    def __init__(self, model: Model, sampling: dict[str, Any], system: str | None) -> None:
        self._model = model
        self._settings = model.defaults() | sampling
        self._system = system
        self._last: Answer | None = None
        self.messages: list[dict[str, Any]] = []
        self.failed = False

    def handle(self, turn: str) -> bool:
        """Answers one turn or carries out a command; False when it is time to leave."""
        name, _, argument = turn.strip().partition(" ")
        try:
            if name in ("/exit", "/quit", "/bye"):
                return False
            if name.startswith("/"):
                self._command(name)(argument.strip())
            elif turn.strip():
                self._ask([*self.messages, {"role": "user", "content": turn}])
        except (JaxserveError, OSError) as error:
            self.failed = True
            print(f"Error: {error}", file=sys.stderr, flush=True)
        return True

    # --- commands: the first line of a docstring is its help --------------------------------------

    def help(self, _: str) -> None:
        """/help: list the commands."""
        for command in self._commands().values():
            print((command.__doc__ or "").splitlines()[0])
        print("/exit: leave.")
        print(KEYBOARD)

    def reset(self, _: str) -> None:
        """/reset: forget the conversation, not the system message."""
        self.messages = []

    def system(self, text: str) -> None:
        """/system TEXT: set the system message; without TEXT, remove it."""
        self._system = text or None

    def set(self, text: str) -> None:
        """/set NAME VALUE: change a sampling setting; without arguments, show all."""
        name, _, value = text.partition(" ")
        if not name:
            print("\n".join(f"{name} = {value!r}" for name, value in self._settings.items()))
            return
        if name not in self._settings:
            known = ", ".join(self._settings)
            raise InvalidRequestError(f"There is no setting {name!r}; there are {known}.")
        if value:
            changed = self._settings | {name: _parse(value.strip())}
            self._model.check(changed)
            self._settings = changed
        print(f"{name} = {self._settings[name]!r}")

    def stats(self, _: str) -> None:
        """/stats: figures of the last answer and of all so far."""
        answer = self._last
        if answer is not None and answer.token_times:
            print(f"last answer: {answer.summary()}")
            first, cached = f"first token after {answer.first_after():.2f} s", answer.cached_tokens
            print(
                first
                if cached is None
                else f"{first}, {cached} prompt tokens from the prefix cache"
            )
            if answer.prompt_tokens is not None and answer.output_tokens is not None:
                most = self._model.max_model_len
                limit = "" if most is None else f" of {most}"
                print(f"context: {answer.prompt_tokens + answer.output_tokens}{limit} tokens")
        totals = self._model.totals()
        if totals is not None:
            print(totals)

    def retry(self, _: str) -> None:
        """/retry: answer the last message anew."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] != "user":
            end -= 1
        if not end:
            raise InvalidRequestError("There is nothing to answer yet.")
        self._ask(self.messages[:end])

    def save(self, file: str) -> None:
        """/save FILE: write the conversation as JSON messages."""
        _name_needed(file)
        Path(file).expanduser().write_text(json.dumps(self._all(self.messages), indent=2) + "\n")
        print(f"Saved {len(self.messages)} messages.")

    def load(self, file: str) -> None:
        """/load FILE: go on with a saved conversation."""
        _name_needed(file)
        messages = _checked_messages(_read(file))
        system = [message["content"] for message in messages if message["role"] == "system"]
        self._system = system[0] if system else None
        self.messages = [message for message in messages if message["role"] != "system"]
        print(f"Loaded {len(self.messages)} messages.")

    # --- inside -----------------------------------------------------------------------------------

    def _commands(self) -> dict[str, Callable[[str], None]]:
        names = ("help", "reset", "system", "set", "stats", "retry", "save", "load")
        return {f"/{name}": getattr(self, name) for name in names}

    def _command(self, name: str) -> Callable[[str], None]:
        commands = self._commands()
        if name not in commands:
            raise InvalidRequestError(f"There is no command {name}; /help lists them.")
        return commands[name]

    def _all(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + messages

    def _ask(self, messages: list[dict[str, Any]]) -> None:
        """Answers the last of the messages; the answer joins them, unless there is none."""
        answer = self._model.answer(self._all(messages), self._settings)
        print(" [stopped]" if answer.stopped else "", flush=True)
        self._last = answer
        if answer.text or not answer.stopped:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]


def _parse(value: str) -> Any:
    """A number, a truth value, a list in JSON's spelling, none, or else a string."""
    if value.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[value.lower()]
    try:
        return json.loads(value)
    except ValueError:
        return value


def _checked_messages(text: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"The file is no JSON: {error}.") from None
    whole = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not whole:
        raise InvalidRequestError('The file must hold a list of {"role": ..., "content": ...}.')
    return messages


def _name_needed(file: str) -> None:
    if not file:
        raise InvalidRequestError("Give the name of a file.")


def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from None
