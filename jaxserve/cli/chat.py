"""``jaxserve chat``: a conversation on the terminal, or with lines piped in."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.cli import flags
from jaxserve.cli.flags import Parser
from jaxserve.cli.turns import read_turns
from jaxserve.errors import ConfigError, InvalidRequestError, JaxserveError
from jaxserve.sampling.params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.cli.streaming import Answer
    from jaxserve.llm import LLM

HELP = "chat with a model on the terminal"
KEYBOARD = """\
A backslash at the end of a line goes on with the next one; so does text between lines of \"\"\".
Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve chat [MODEL] [options]",
        description="Chats with a model; /help lists the commands. With standard input from a "
        "file or a pipe, each line is a turn.",
    )
    flags.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", type=str, help="instructions to begin with")
    parser.add_argument(
        "--chat-template", metavar="FILE", type=str, help="Jinja that replaces the tokenizer's"
    )
    flags.add_sampling_flags(parser, None)
    flags.add_engine_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Loads the model and chats until the input ends."""
    engine, sampling = flags.engine_arguments(args), flags.sampling_arguments(args)
    template = None if args.chat_template is None else _read(args.chat_template)
    interactive = sys.stdin.isatty()

    from jaxserve.llm import LLM

    with LLM(
        **engine, chat_template=template, warmup="background", use_tqdm=sys.stderr.isatty()
    ) as llm:
        if not llm.get_tokenizer().chat_template:
            raise ConfigError(
                f"{engine['model']} has no chat template, so it is probably not made for chatting. "
                "Use `jaxserve generate`, or pass --chat-template FILE."
            )
        chat = Chat(llm, sampling, args.system)
        if interactive:
            chat.greet(engine["model"])
        with contextlib.suppress(KeyboardInterrupt):  # at the prompt it means: leave
            for turn in read_turns(sys.stdin, interactive):
                if not chat.handle(turn):
                    break
    return 0 if interactive else int(chat.failed)


class Chat:
    """One conversation and its settings.

    Args:
        llm: the model.
        sampling: fields of SamplingParams that differ from the model's defaults.
        system: the system message, if any.

    Attributes:
        messages: the turns so far, without the system message.
        failed: whether any input was refused.
    """

    def __init__(self, llm: LLM, sampling: dict[str, Any], system: str | None) -> None:
        self._llm = llm
        defaults = llm.get_default_sampling_params()
        self._settings = {name: getattr(defaults, name) for name in _setting_names()}
        # Without a limit an answer may go on to the context's end.
        self._settings |= {"max_tokens": None} | sampling
        self._system = system
        self._last: Answer | None = None
        self.messages: list[dict[str, Any]] = []
        self.failed = False

    def greet(self, model: str | None) -> None:
        """Says who is there."""
        if model is None:
            print("Chatting with the demo model, a toy of 5 million parameters: it knows a little")
            print("about jaxserve and small talk, and it is no measure of quality.")
        else:
            print(f"Chatting with {model}.")
        print("/help lists the commands.")

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
            SamplingParams(**changed)
            self._settings = changed
        print(f"{name} = {self._settings[name]!r}")

    def stats(self, _: str) -> None:
        """/stats: figures of the last answer and of all so far."""
        if self._last is not None and self._last.output is not None:
            answer, output = self._last, self._last.output
            print(f"last answer: {answer.summary()}")
            first = answer.token_times[0] - answer.started
            cached = output.num_cached_tokens or 0
            print(f"first token after {first:.2f} s, {cached} prompt tokens from the prefix cache")
            used = len(output.prompt_token_ids) + len(answer.token_times)
            print(f"context: {used} of {self._llm.config.max_model_len} tokens")
        total = self._llm.stats
        print(
            f"in all: prompt {total.prompt_tokens} tokens ({total.cached_tokens} cached), "
            f"output {total.generation_tokens} tokens, {total.steps} steps"
        )

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
        from jaxserve.cli.streaming import stream

        answer = stream(self._llm, self._all(messages), SamplingParams(**self._settings))
        print(" [stopped]" if answer.stopped else "", flush=True)
        self._last = answer
        if answer.text or not answer.stopped:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]


def _setting_names() -> list[str]:
    names = list(SamplingParams.__dataclass_fields__)
    return [name for name in names if name not in flags.SAMPLING_HIDDEN]


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
