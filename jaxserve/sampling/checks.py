"""Checks of SamplingParams' fields; their errors name the field and the limit. No JAX here."""

from __future__ import annotations

from typing import Any

from jaxserve.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_SEQUENCES = 2 * MAX_BAD_WORDS
MAX_BAD_WORD_TOKENS = 16
FLOAT32_MAX = 3.4028234e38


def error(name: str, value: Any, rule: str) -> InvalidRequestError:
    """The error of a field whose value breaks a rule."""
    return InvalidRequestError(f"{name} {rule}, got {_short(value)}.", param=name)


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_int(name: str, value: Any) -> None:
    """Refuses all but integers; True is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(name, value, "must be an integer")


def check_float(name: str, value: Any) -> float:
    """A finite number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error(name, value, "must be a number")
    # Comparing first: an integer can be too large for a float.
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise error(name, value, "must be a finite 32-bit number")
    return float(value)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuses what lies below ``low`` or above ``high``."""
    if not low <= value <= high:
        raise error(name, value, f"must be from {low} to {high}")


def check_texts(name: str, value: Any, most: int, max_chars: int) -> tuple[str, ...]:
    """One string, several or none, as a tuple."""
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise error(name, value, "must be a string or a list of strings")
    if len(texts) > most:
        raise error(name, len(texts), f"takes at most {most} strings")
    for text in texts:
        if not 0 < len(text) <= max_chars:
            raise error(name, text, f"strings must have 1 to {max_chars} characters")
    return tuple(texts)


def check_token_ids(name: str, ids: Any, most: int | None = None) -> tuple[int, ...]:
    """Token ids or None, as a tuple. Whether the model has them is checked at admission."""
    ids = () if ids is None else ids
    if not isinstance(ids, list | tuple):
        raise error(name, ids, "must be a list of integers")
    for token in ids:
        check_int(name, token)
        check_range(name, token, 0, 2**31 - 1)
    if most is not None and len(ids) > most:
        raise error(name, len(ids), f"takes at most {most} ids")
    return tuple(ids)


def check_logit_bias(bias: Any) -> dict[int, float] | None:
    """Biases by token id; JSON's keys are strings. None if there are none."""
    if bias is None:
        return None
    if not isinstance(bias, dict):
        raise error("logit_bias", bias, "must be a dict of token ids and numbers")
    if len(bias) > MAX_LOGIT_BIAS:
        raise error("logit_bias", len(bias), f"takes at most {MAX_LOGIT_BIAS} tokens")
    checked = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10:
            token = int(token)
        check_int("logit_bias", token)
        check_range("logit_bias", token, 0, 2**31 - 1)
        checked[token] = check_float("logit_bias", value)
        check_range("logit_bias", checked[token], -100, 100)
    return checked or None


def check_bad_words_token_ids(sequences: Any) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids, or None, as tuples."""
    name = "bad_words_token_ids"
    sequences = () if sequences is None else sequences
    if not isinstance(sequences, list | tuple):
        raise error(name, sequences, "must be a list of lists of integers")
    if len(sequences) > MAX_BAD_WORD_SEQUENCES:
        raise error(name, len(sequences), f"takes at most {MAX_BAD_WORD_SEQUENCES} sequences")
    checked = tuple(check_token_ids(name, ids, MAX_BAD_WORD_TOKENS) for ids in sequences)
    if not all(checked):
        raise error(name, sequences, "must hold at least one token each")
    return checked
