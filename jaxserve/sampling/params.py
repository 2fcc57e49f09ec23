"""SamplingParams: what one request asks of the sampler, validated when it is made. No JAX here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 16
GREEDY_TEMPERATURE = 1e-5
MIN_TEMPERATURE = 1e-2
MIN_REPETITION_PENALTY = 1e-2
FLOAT32_MAX = 3.4028234e38
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
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in ("n", "top_k", "min_tokens"):
            _check_int(name, getattr(self, name))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "must be True or False")
        for name in ("seed", "max_tokens", "logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        _check_range("n", self.n, 1, MAX_N)
        if self.top_k < -1 or self.top_k >= 2**31:
            raise _error("top_k", self.top_k, "must be -1 or 0 (off) or a positive 32-bit integer")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            set_(name, _check_float(name, getattr(self, name)))
        for name in ("presence_penalty", "frequency_penalty"):
            set_(name, _check_float(name, getattr(self, name)))
            _check_range(name, getattr(self, name), -2, 2)
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("min_p", self.min_p, 0, 1)
        if not 0 < self.top_p <= 1:
            raise _error("top_p", self.top_p, "must be greater than 0 and at most 1")
        if self.repetition_penalty < MIN_REPETITION_PENALTY:
            rule = f"must be at least {MIN_REPETITION_PENALTY}"
            raise _error("repetition_penalty", self.repetition_penalty, rule)
        if self.seed == -1:
            set_("seed", None)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise _error("seed", self.seed, "must fit in 64 bits")
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _error("min_tokens", self.min_tokens, f"exceeds max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        set_("stop", _check_stop(self.stop))
        set_("stop_token_ids", _check_stop_token_ids(self.stop_token_ids))
        if self.stop and not self.detokenize:
            raise _error("stop", self.stop, "needs detokenize=True; use stop_token_ids instead")
        if self.temperature < GREEDY_TEMPERATURE:
            # Greedy: the truncations change nothing, so they are off and the fast path is taken.
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                set_(name, value)
            if self.n > 1:
                raise _error("n", self.n, "must be 1 with greedy sampling (temperature 0)")
        else:
            set_("temperature", max(self.temperature, MIN_TEMPERATURE))
            set_("top_k", max(self.top_k, 0))

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

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)


def _error(name: str, value: Any, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {rule}, got {_short(value)}.", param=name)


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _error(name, value, "must be an integer")


def _check_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(name, value, "must be a number")
    # Comparing first: an integer can be too large for a float.
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise _error(name, value, "must be a finite 32-bit number")
    return float(value)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise _error(name, value, f"must be from {low} to {high}")


def _check_stop(stop: Any) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops):
        raise _error("stop", stop, "must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise _error("stop", len(stops), f"takes at most {MAX_STOP_STRINGS} strings")
    for text in stops:
        if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
            rule = f"strings must have 1 to {MAX_STOP_STRING_CHARS} characters"
            raise _error("stop", text, rule)
    return tuple(stops)


def _check_stop_token_ids(ids: Any) -> tuple[int, ...]:
    ids = () if ids is None else ids
    if not isinstance(ids, list | tuple):
        raise _error("stop_token_ids", ids, "must be a list of integers")
    for token in ids:
        _check_int("stop_token_ids", token)
        _check_range("stop_token_ids", token, 0, 2**31 - 1)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise _error("stop_token_ids", len(ids), f"takes at most {MAX_STOP_TOKEN_IDS} ids")
    return tuple(ids)
