"""One completion of a request while it grows: from the engine's tokens to text."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.request import FinishReason
from jaxserve.errors import RequestFailedError
from jaxserve.outputs import Generation, Logprob
from server.engine_stream import TokenEvent
from server.errors import unavailable
from server.service import Prompt

TokenLogprobs = dict[int, Logprob]


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
    logprobs: list[TokenLogprobs] | None
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
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
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
        text = self._add(event)
        if event.finish_reason is not None and self.output.finish_reason is None:
            reason = FinishReason(event.finish_reason)
            text += self._generation.finish(reason, event.stop_reason)
        return self.since(start, text)

    def add_tokens(self, token_ids: list[int]) -> str:
        """Adds tokens of which there is nothing else to tell; returns their text."""
        output, append, text = self.output, self._generation.append, ""
        for token_id in token_ids:
            text += append(token_id, None)
            if output.finish_reason is not None:
                break  # a stop string: what follows is surplus
        return text

    def _add(self, event: TokenEvent) -> str:
        """Adds an event's tokens, but not what else it tells; returns their text."""
        output, append, text = self.output, self._generation.append, ""
        last = len(event.token_ids) - 1
        for place, token_id in enumerate(event.token_ids):
            logprobs = None if event.logprobs is None else event.logprobs[place]
            stops = place == last and event.finish_reason == FinishReason.STOP
            text += append(token_id, logprobs, stops)
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
