"""What a chat on the terminal talks to: a model in this process, or one that a server has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from jaxserve.cli import flags
from jaxserve.cli.complete_client import Client
from jaxserve.cli.streaming import Answer, stream, stream_served
from jaxserve.sampling.params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

SETTINGS = tuple(
    name for name in SamplingParams.__dataclass_fields__ if name not in flags.SAMPLING_HIDDEN
)
"""The sampling settings of a chat."""


class Model(Protocol):
    """Answers conversations.

    Attributes:
        greeting: says who is there.
        max_model_len: the context's length in tokens; None if it is unknown.
    """

    greeting: str
    max_model_len: int | None

    def defaults(self) -> dict[str, Any]:
        """The values of SETTINGS where the user sets nothing."""

    def check(self, settings: dict[str, Any]) -> None:
        """Raises InvalidRequestError if one is out of its range."""

    def answer(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Answer:
        """Answers the last of the messages, printing the text as it comes."""

    def totals(self) -> str | None:
        """A line of figures of all answers so far, if they are known."""


class LocalModel:
    """A model in this process; ``name`` is None for the demo model."""

    def __init__(self, llm: LLM, name: str | None) -> None:
        self._llm = llm
        self.max_model_len: int | None = llm.config.max_model_len
        self.greeting = (
            f"Chatting with {name}."
            if name is not None
            else (
                "Chatting with the demo model, a toy of 5 million parameters: it knows a little\n"
                "about jaxserve and small talk, and it is no measure of quality."
            )
        )

    def defaults(self) -> dict[str, Any]:
        """The model's own."""
        params = self._llm.get_default_sampling_params()
        # Without a limit an answer may go on to the context's end.
        return {name: getattr(params, name) for name in SETTINGS} | {"max_tokens": None}

    def check(self, settings: dict[str, Any]) -> None:
        """See Model."""
        SamplingParams(**settings)

    def answer(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Answer:
        """See Model."""
        return stream(self._llm, messages, SamplingParams(**settings))

    def totals(self) -> str:
        """See Model."""
        total = self._llm.stats
        return (
            f"in all: prompt {total.prompt_tokens} tokens ({total.cached_tokens} cached), "
            f"output {total.generation_tokens} tokens, {total.steps} steps"
        )


class ServedModel:
    """A model of a running server, the first one if ``name`` is None. A setting that is None is
    left to the server.

    Raises:
        ServerError: the server can't be reached, or refuses to say what it has.
    """

    def __init__(self, client: Client, name: str | None) -> None:
        self._client = client
        card = client.model(name)
        self._name = card["id"]
        self.max_model_len: int | None = card.get("max_model_len")
        self.greeting = f"Chatting with {self._name} at {client.url}."

    def defaults(self) -> dict[str, Any]:
        """Only the server knows them."""
        return dict.fromkeys(SETTINGS)

    def check(self, settings: dict[str, Any]) -> None:
        """See Model."""
        # Without a limit here, so that min_tokens is not compared with a default.
        SamplingParams(**{"max_tokens": None} | _given(settings))

    def answer(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Answer:
        """See Model."""
        body = {"model": self._name, "messages": messages, **_given(settings)}
        return stream_served(self._client, "/v1/chat/completions", body)

    def totals(self) -> None:
        """A server's figures are not this chat's."""


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
