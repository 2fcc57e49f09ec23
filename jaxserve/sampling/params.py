"""SamplingParams: what one request asks of the sampler, validated when it is made. No JAX here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.sampling.checks import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    check_bad_words_token_ids,
    check_float,
    check_int,
    check_logit_bias,
    check_range,
    check_texts,
    check_token_ids,
    error,
)

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 16
GREEDY_TEMPERATURE = 1e-5
MIN_TEMPERATURE = 1e-2
MIN_REPETITION_PENALTY = 1e-2
LISTS = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids")
"""What is an empty tuple instead of None."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling settings of one request; names and defaults are vLLM's.

    Attributes:
        n: completions per prompt, 1 to 128; completion i uses ``seed + i`` when a seed is set.
        temperature: 0 to 2; below 0.00001 it means greedy, from there to 0.01 it is raised to 0.01.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
        repetition_penalty: at least 0.01; divides positive and multiplies negative logits of
            tokens that stand in the prompt or the output (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: -2 to 2; subtracted once from the logit of every token in the output.
        frequency_penalty: -2 to 2; subtracted for each occurrence of a token in the output.
        seed: makes the request's tokens reproducible whatever else is in the batch.
        stop: strings that end the text; they are cut off unless ``include_stop_str_in_output``.
        stop_token_ids: token ids that end the text, besides the model's own end tokens.
        ignore_eos: do not end at the model's end tokens.
        max_tokens: most tokens to generate; None means up to the context's end.
        min_tokens: no end token or stop token is chosen before this many tokens.
        logprobs: log-probabilities of this many likeliest tokens per position (and the chosen
            one), taken before temperature and penalties.
        prompt_logprobs: the same for the prompt's tokens; the prompt then makes no use of cached
            prefixes.
        logit_bias: token id -> -100 to 100, added to the logit; at most 1024 tokens. The ids may
            be strings, as in JSON.
        allowed_token_ids: only these tokens are generated.
        bad_words: texts that are not generated, with or without a space before them: the token
            that would complete one is ruled out. At most 64.
        bad_words_token_ids: the same as sequences of token ids, at most 128 of at most 16 tokens;
            whoever has the tokenizer sets them from ``bad_words``, see ``Tokenizer.bad_words``.
        truncate_prompt_tokens: keep only this many last tokens of the prompt; -1 for as many as
            leave room for one token of output.
        detokenize: make text; False returns token ids only.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: accepted for compatibility; it matters to slow tokenizers
            only, and the fast ones used here ignore it.
        include_stop_str_in_output: keep the stop string at the text's end.

    Raises:
        InvalidRequestError: a value is out of its range; names the field and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    bad_words: str | list[str] | tuple[str, ...] | None = None
    bad_words_token_ids: Sequence[Sequence[int]] | None = None
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        # Few differ from their defaults, and those that don't need no look.
        given = [(name, value) for name, value in vars(self).items() if value is not _KNOWN[name]]
        for name, value in given:
            set_(name, _CHECKS[name](name, value))
        for name in LISTS:
            if getattr(self, name) is None:
                set_(name, ())
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise error("min_tokens", self.min_tokens, f"exceeds max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            raise error("stop", self.stop, "needs detokenize=True; use stop_token_ids instead")
        if self.temperature < GREEDY_TEMPERATURE:
            # Greedy: the truncations change nothing, so they are off and the fast path is taken.
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                set_(name, value)
            if self.n > 1:
                raise error("n", self.n, "must be 1 with greedy sampling (temperature 0)")
        elif self.temperature < MIN_TEMPERATURE:
            set_("temperature", MIN_TEMPERATURE)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def has_edits(self) -> bool:
        """Whether logits of single tokens are changed or ruled out throughout."""
        return bool(
            self.logit_bias or self.allowed_token_ids is not None or self.bad_words_token_ids
        )

    def truncated(self, prompt_token_ids: list[int], max_model_len: int) -> list[int]:
        """The prompt as ``truncate_prompt_tokens`` says."""
        count = self.truncate_prompt_tokens
        if count is None:
            return prompt_token_ids
        return prompt_token_ids[-(max_model_len - 1 if count == -1 else count) :]

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)


# --- what each field may hold ---------------------------------------------------------------------

Check = Callable[[str, Any], Any]
"""From a field's name and value to what it shall hold; raises InvalidRequestError."""


def _integer(low: int, high: int = 2**31 - 1) -> Check:
    def check(name: str, value: Any) -> int:
        check_int(name, value)
        check_range(name, value, low, high)
        return int(value)

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        number = check_float(name, value)
        check_range(name, number, low, high)
        return number

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise error(name, value, "must be True or False")
    return value


def _top_k(name: str, value: Any) -> int:
    check_int(name, value)
    if value < -1 or value >= 2**31:
        raise error(name, value, "must be -1 or 0 (off) or a positive 32-bit integer")
    return max(int(value), 0)


def _top_p(name: str, value: Any) -> float:
    number = check_float(name, value)
    if not 0 < number <= 1:
        raise error(name, number, "must be greater than 0 and at most 1")
    return number


def _repetition_penalty(name: str, value: Any) -> float:
    number = check_float(name, value)
    if number < MIN_REPETITION_PENALTY:
        raise error(name, number, f"must be at least {MIN_REPETITION_PENALTY}")
    return number


def _seed(name: str, value: Any) -> int | None:
    check_int(name, value)
    if not -(2**63) <= value < 2**63:
        raise error(name, value, "must fit in 64 bits")
    return None if value == -1 else int(value)


def _truncate_prompt_tokens(name: str, value: Any) -> int:
    check_int(name, value)
    if value != -1:
        check_range(name, value, 1, 2**31 - 1)
    return int(value)


def _allowed_token_ids(name: str, value: Any) -> tuple[int, ...]:
    allowed = check_token_ids(name, value)
    if not allowed:
        raise error(name, [], "must hold at least one id")
    return allowed


def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    words = check_texts(name, value, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
    if not all(word.strip() for word in words):
        raise error(name, words, "must not be blank")
    return words


_CHECKS: Mapping[str, Check] = {
    "n": _integer(1, MAX_N),
    "temperature": _number(0, 2),
    "top_p": _top_p,
    "top_k": _top_k,
    "min_p": _number(0, 1),
    "repetition_penalty": _repetition_penalty,
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _optional(_seed),
    "stop": lambda name, value: check_texts(name, value, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS),
    "stop_token_ids": lambda name, value: check_token_ids(name, value, MAX_STOP_TOKEN_IDS),
    "ignore_eos": _flag,
    "max_tokens": _optional(_integer(1)),
    "min_tokens": _integer(0),
    "logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "prompt_logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "logit_bias": lambda name, value: check_logit_bias(value),
    "allowed_token_ids": _optional(_allowed_token_ids),
    "bad_words": _bad_words,
    "bad_words_token_ids": lambda name, value: check_bad_words_token_ids(value),
    "truncate_prompt_tokens": _optional(_truncate_prompt_tokens),
    "detokenize": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "include_stop_str_in_output": _flag,
}
_KNOWN = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
"""The defaults, which need no check."""
