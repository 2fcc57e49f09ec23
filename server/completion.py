"""One completion of a request while it grows: from the engine's tokens to text."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.errors import RequestFailedError
from jaxserve.outputs import Generation, Logprob
from server.engine_stream import TokenEvent
from server.errors import unavailable
from server.service import Prompt

ShownLogprobs = dict[int, Logprob]


def check(event: TokenEvent) -> TokenEvent:
    """The event, unless it tells of a failure.

    Raises:
        RequestFailedError: the engine gave the request up.
        ApiError: the engine aborted it, because the server shuts down.
    """
    if event.finish_reason == FinishReason.ERROR:
        raise RequestFailedError(event.error or "The generation failed.")
    if event.finish_reason == FinishReason.ABORT:
        raise unavailable("The server ended this request before it was done.", "aborted")
    return event


@dataclass(slots=True)
class Delta:
    """What one event of the engine added to a completion; or all of it.

    Attributes:
        logprobs: of its tokens, if they were asked for.
        finish_reason, stop_reason: why the completion ended, if this ended it.
    """

    completion: Completion
    text: str
    token_ids: list[int]
    logprobs: list[ShownLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Completion:
    """One completion of one prompt.

    Attributes:
        number: among those of the request, see ``Run``.
        output: its text and tokens so far, see CompletionOutput.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        prompt_logprobs: per prompt token, None for the first, if asked for.
    """

    def __init__(self, number: int, prompt: Prompt, generation: Generation) -> None:
        self.number = number
        self.prompt = prompt
        self.output = generation.output
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[ShownLogprobs | None] | None = None
        self.first_event_at: float | None = None
        self.last_event_at = 0.0
        self._generation = generation

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; by it the best of several are chosen."""
        return (self.output.cumulative_logprob or 0.0) / max(len(self.output.token_ids), 1)

    def take(self, event: TokenEvent) -> Delta:
        """Adds an event's tokens; a stop string may end the completion among them. Raises what
        ``check`` raises."""
        check(event)
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *map(self._generation.shown, event.prompt_logprobs)]
        start = len(self.output.token_ids)
        stops = event.finish_reason == FinishReason.STOP
        text = self.add(event.token_ids, event.logprobs, stops)
        if event.finish_reason is not None and self.output.finish_reason is None:
            reason = FinishReason(event.finish_reason)
            text += self._generation.finish(reason, event.stop_reason)
        return self.since(start, text)

    def add(
        self,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        stops: bool = False,
    ) -> str:
        """Adds tokens; returns their text.

        Args:
            logprobs: of each, if they were asked for.
            stops: the last one ends the completion, see ``Generation.append``.
        """
        output, append, text = self.output, self._generation.append, ""
        last = len(token_ids) - 1
        for place, token_id in enumerate(token_ids):
            its_logprobs = None if logprobs is None else logprobs[place]
            text += append(token_id, its_logprobs, stops and place == last)
            if output.finish_reason is not None:
                break  # a stop string: what follows is surplus
        return text

    def whole(self) -> Delta:
        """All that came so far."""
        return self.since(0, self.output.text)

    def since(self, start: int, text: str) -> Delta:
        """The output from a place among its tokens on, of which this is the text."""
        output = self.output
        logprobs = None if output.logprobs is None else output.logprobs[start:]
        ids, reason, stop = output.token_ids[start:], output.finish_reason, output.stop_reason
        return Delta(self, text, ids, logprobs, reason, stop)
