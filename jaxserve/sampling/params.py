"""SamplingParams: what one request asks of the sampler, validated when it is made. No JAX here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
OPTIONAL_INTEGERS = (
    *("seed", "max_tokens", "logprobs", "prompt_logprobs"),
    "truncate_prompt_tokens",
)
FLAGS = (
    *("ignore_eos", "detokenize", "skip_special_tokens"),
    *("spaces_between_special_tokens", "include_stop_str_in_output"),
)


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
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in ("n", "top_k", "min_tokens"):
            check_int(name, getattr(self, name))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise error(name, getattr(self, name), "must be True or False")
        for name in OPTIONAL_INTEGERS:
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_range("n", self.n, 1, MAX_N)
        if self.top_k < -1 or self.top_k >= 2**31:
            raise error("top_k", self.top_k, "must be -1 or 0 (off) or a positive 32-bit integer")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            set_(name, check_float(name, getattr(self, name)))
        for name in ("presence_penalty", "frequency_penalty"):
            set_(name, check_float(name, getattr(self, name)))
            check_range(name, getattr(self, name), -2, 2)
        check_range("temperature", self.temperature, 0, 2)
        check_range("min_p", self.min_p, 0, 1)
        if not 0 < self.top_p <= 1:
            raise error("top_p", self.top_p, "must be greater than 0 and at most 1")
        if self.repetition_penalty < MIN_REPETITION_PENALTY:
            rule = f"must be at least {MIN_REPETITION_PENALTY}"
            raise error("repetition_penalty", self.repetition_penalty, rule)
        if self.seed == -1:
            set_("seed", None)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise error("seed", self.seed, "must fit in 64 bits")
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise error("min_tokens", self.min_tokens, f"exceeds max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            check_range("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31 - 1)
        stop = check_texts("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
        ids = check_token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        set_("stop", stop)
        set_("stop_token_ids", ids)
        self._check_edits(set_)
        if self.stop and not self.detokenize:
            raise error("stop", self.stop, "needs detokenize=True; use stop_token_ids instead")
        if self.temperature < GREEDY_TEMPERATURE:
            # Greedy: the truncations change nothing, so they are off and the fast path is taken.
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                set_(name, value)
            if self.n > 1:
                raise error("n", self.n, "must be 1 with greedy sampling (temperature 0)")
        else:
            set_("temperature", max(self.temperature, MIN_TEMPERATURE))
            set_("top_k", max(self.top_k, 0))

    def _check_edits(self, set_: Callable[[str, Any], None]) -> None:
        """Those that change logits of single tokens."""
        set_("logit_bias", check_logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = check_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise error("allowed_token_ids", [], "must hold at least one id")
            set_("allowed_token_ids", allowed)
        words = check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        if not all(word.strip() for word in words):
            raise error("bad_words", words, "must not be blank")
        set_("bad_words", words)
        set_("bad_words_token_ids", check_bad_words_token_ids(self.bad_words_token_ids))

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
