"""What a benchmark asks of an engine: prompts as token ids, and how many tokens to answer with."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

FIRST_ID = 10
"""Random ids begin here, beyond the special tokens that most vocabularies begin with."""
MIN_LEN, MAX_PROMPT_LEN, MAX_TOTAL_LEN = 4, 1024, 2048
"""Conversations of ShareGPT outside of these lengths are left out, as vLLM's benchmark does."""


@dataclass(frozen=True)
class Item:
    """One request.

    Attributes:
        prompt: token ids.
        output_len: tokens to generate, whatever they are.
    """

    prompt: list[int]
    output_len: int


def random_items(
    lengths: Sequence[tuple[int, int]], vocab_size: int, rng: random.Random
) -> list[Item]:
    """Random prompts of given (input, output) lengths."""
    first = min(FIRST_ID, vocab_size - 1)
    return [
        Item([rng.randrange(first, vocab_size) for _ in range(input_len)], output_len)
        for input_len, output_len in lengths
    ]


def random_lengths(
    count: int, input_len: int, output_len: int, range_ratio: float, rng: random.Random
) -> list[tuple[int, int]]:
    """(input, output) lengths, each drawn evenly from ``[len * (1 - ratio), len * (1 + ratio)]``.

    Raises:
        ConfigError: the ratio isn't in [0, 1).
    """
    if not 0 <= range_ratio < 1:
        raise ConfigError(f"random_range_ratio={range_ratio} must be at least 0 and below 1.")

    def draw(length: int) -> int:
        low, high = length * (1 - range_ratio), length * (1 + range_ratio)
        return rng.randint(max(1, math.floor(low)), max(1, math.ceil(high)))

    return [(draw(input_len), draw(output_len)) for _ in range(count)]


def sharegpt_items(
    path: str | Path,
    count: int,
    encode: Callable[[str], list[int]],
    rng: random.Random,
    output_len: int | None = None,
) -> list[Item]:
    """First question and answer of conversations in ShareGPT's JSON format, in random order.

    Args:
        path: a file with a list of {"conversations": [{"value": text}, ...]}.
        count: how many to take, or as many as there are.
        encode: text to token ids.
        rng: shuffles the conversations.
        output_len: replaces the answers' lengths.

    Raises:
        ConfigError: there is no such file, it has another format, or no conversation fits.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = [_first_turns(entry) for entry in entries if len(entry["conversations"]) >= 2]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is no data set in ShareGPT's format: {error!r}.") from error
    rng.shuffle(pairs)
    items: list[Item] = []
    for question, answer in pairs:
        if len(items) == count:
            break
        prompt = encode(question)
        length = output_len or len(encode(answer))
        fits = len(prompt) <= MAX_PROMPT_LEN and len(prompt) + length <= MAX_TOTAL_LEN
        if fits and len(prompt) >= MIN_LEN and (output_len or length >= MIN_LEN):
            items.append(Item(prompt, length))
    if not items:
        raise ConfigError(f"{path} has no conversation of {MIN_LEN} to {MAX_TOTAL_LEN} tokens.")
    return items


def _first_turns(entry: dict[str, Any]) -> tuple[str, str]:
    question, answer = entry["conversations"][:2]
    return str(question["value"]), str(answer["value"])
