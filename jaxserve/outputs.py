"""What a generation gives back, in vLLM's shapes, and how it grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.engine.stop import StopStrings
from jaxserve.sampling.params import SamplingParams
from jaxserve.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability at a position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One completion.

    Attributes:
        index: 0 to n - 1.
        text: empty when nothing is detokenized.
        token_ids: the output, an end token included.
        cumulative_logprob: sum over the chosen tokens, if logprobs were asked for.
        logprobs: per token {token id: Logprob}, the chosen one always among them.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for an end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """All completions of one prompt.

    Attributes:
        request_id: the request's.
        prompt: its text, if it came as text.
        prompt_token_ids: its token ids.
        outputs: n completions.
        finished: whether all have ended.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        prompt_logprobs: per prompt token {token id: Logprob}, None for the first, if asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    """A prompt's vector, of length 1."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt.

    Attributes:
        request_id: the request's.
        outputs: the embedding.
        prompt_token_ids: what it is of.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        finished: always True.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


class Generation:
    """One completion as it grows: detokenizes, watches for stop strings, gathers log-probabilities.

    Args:
        params: what was asked for.
        prompt_token_ids: the tokens that the output follows.
        index: among the prompt's completions.
        tokenizer: None gives token ids only.
        eos_token_ids: ends that give no ``stop_reason``.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        index: int,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.output = CompletionOutput(index)
        self._params = params
        self._eos = eos_token_ids
        self._tokenizer = tokenizer
        self._stream: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = tokenizer.stream(prompt_token_ids, params.skip_special_tokens)
        self._stop = StopStrings(params.stop or (), params.include_stop_str_in_output)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def append(self, token_id: int, logprobs: TokenLogprobs | None, stops: bool = False) -> str:
        """Takes the next token; returns the text that it adds. A stop string ends the output.

        Args:
            token_id, logprobs: the token.
            stops: it is the end token or stop token that ends the output; like a stop string, it
                adds no text unless ``include_stop_str_in_output``.
        """
        output, params = self.output, self._params
        output.token_ids.append(token_id)
        if logprobs is not None:
            self._append_logprobs(logprobs)
        if self._stream is None or (stops and not params.include_stop_str_in_output):
            return ""
        text = self._stream.feed(token_id)
        if params.stop and len(output.token_ids) > params.min_tokens:
            text = self._stop.feed(text)
            if self._stop.matched is not None:
                output.finish_reason = str(FinishReason.STOP)
                output.stop_reason = self._stop.matched
        # Python makes a string longer in place where there is no other reference to it; else each
        # token would copy all that came before.
        so_far, output.text = output.text, ""
        so_far += text
        output.text = so_far
        return text

    def finish(self, reason: FinishReason, stop_reason: int | None = None) -> str:
        """Ends the output as the engine says, unless a stop string ended it already.

        Args:
            reason: the engine's.
            stop_reason: the token id that ended it, if one did.

        Returns:
            The text that was still held back.
        """
        if self.output.finish_reason is not None:
            return ""
        text = ""
        if self._stream is not None:
            text = self._stop.feed(self._stream.flush()) + self._stop.flush()
        self.output.text += text
        self.output.finish_reason = str(reason)
        self.output.stop_reason = None if stop_reason in self._eos else stop_reason
        return text

    def _append_logprobs(self, logprobs: TokenLogprobs) -> None:
        assert self.output.logprobs is not None and self.output.cumulative_logprob is not None
        self.output.logprobs.append(self.shown(logprobs))
        self.output.cumulative_logprob += logprobs.logprob

    def shown(self, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        """One position's log-probabilities with their tokens as text: the likeliest first, and the
        chosen one at the end if it isn't among them."""
        entries = [(*top, rank) for rank, top in enumerate(logprobs.top, start=1)]
        entries.append((logprobs.token_id, logprobs.logprob, logprobs.rank))
        return {
            token_id: Logprob(
                logprob, rank, None if self._tokenizer is None else self._tokenizer.token(token_id)
            )
            for token_id, logprob, rank in entries
        }


def completion_params(params: SamplingParams, index: int) -> SamplingParams:
    """The params of one of a prompt's ``params.n`` completions: its own seed, if there is one."""
    if params.seed is None:
        return params
    seed = params.seed + index
    # -1 means no seed, and seeds have 64 bits.
    return params.replace(seed=seed if -1 != seed < 2**63 else seed % 2**63)
