"""What a request's token ids may be; whoever takes requests in asks here. No JAX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxserve.errors import InvalidRequestError
from jaxserve.sampling.params import SamplingParams


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        max_model_len: longest sequence, prompt and output together.
        vocab_size: width of the logits; token ids must lie below it.
    """

    max_model_len: int
    vocab_size: int

    def check_prompt(self, prompt: list[int]) -> None:
        """Checks a prompt's length and its ids.

        Raises:
            InvalidRequestError: it could not be served, now or ever; says why.
        """
        if not prompt:
            raise InvalidRequestError("The prompt is empty; give at least one token.", "prompt")
        if len(prompt) >= self.max_model_len:
            raise InvalidRequestError(
                f"The prompt has {len(prompt)} tokens, but max_model_len is {self.max_model_len} "
                "and at least one must be left for the output. Shorten the prompt or raise "
                "max_model_len.",
                "prompt",
            )
        self.check_token_ids("prompt", prompt)

    def check_priority(self, priority: int) -> None:
        """Priorities are compared with each other.

        Raises:
            InvalidRequestError: it is no integer.
        """
        if type(priority) is not int:
            message = f"priority must be an integer, got {priority!r}."
            raise InvalidRequestError(message, "priority")

    def check_params(self, params: SamplingParams) -> None:
        """Checks what SamplingParams alone can't know.

        Raises:
            InvalidRequestError: a token id is out of range, or ``bad_words`` were not tokenized.
        """
        self.check_token_ids("stop_token_ids", params.stop_token_ids or ())
        self.check_token_ids("logit_bias", params.logit_bias or {})
        self.check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        for sequence in params.bad_words_token_ids or ():
            self.check_token_ids("bad_words_token_ids", sequence)
        if params.bad_words and not params.bad_words_token_ids:
            message = "bad_words need a tokenizer; use bad_words_token_ids."
            raise InvalidRequestError(message, "bad_words")

    def check_token_ids(self, param: str, ids: Iterable[int]) -> None:
        """Out-of-range ids must not reach the device: gathers there clamp or wrap in silence.

        Raises:
            InvalidRequestError: one is out of range, or no integer; names ``param``.
        """
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:  # bools are no ids
                raise InvalidRequestError(
                    f"{param} holds {token!r}; token ids are integers from 0 to "
                    f"{self.vocab_size - 1}.",
                    param,
                )
