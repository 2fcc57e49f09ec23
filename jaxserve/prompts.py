"""The forms in which users give prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenizer import Tokenizer

Prompt = str | Sequence[int] | dict[str, Any]
"""A text, token ids, or a dict with "prompt" or "prompt_token_ids", and optionally "cache_salt"."""


def parse(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, list[int], str]:
    """(text, token ids, cache salt) of a prompt in any of its forms.

    Raises:
        InvalidRequestError: it is none of them, or a text without a tokenizer.
    """
    text, ids, salt = None, None, ""
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, dict):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        salt = prompt.get("cache_salt", "")
    else:
        ids = prompt
    if ids is None and isinstance(text, str):
        if tokenizer is None:
            message = "Without a tokenizer a prompt must be a list of token ids."
            raise InvalidRequestError(message, "prompt")
        ids = tokenizer.encode(text)
    if not isinstance(ids, Sequence):
        message = 'A prompt is a text, a list of token ids, or {"prompt": ...}.'
        raise InvalidRequestError(message, "prompt")
    return text, list(ids), salt


def priorities(priority: Sequence[int] | None, count: int) -> Sequence[int]:
    """A priority for each of so many prompts; 0 for all by default.

    Raises:
        InvalidRequestError: there are more or fewer.
    """
    if priority is None:
        return [0] * count
    if len(priority) != count:
        message = f"{len(priority)} priorities were given for {count} prompts."
        raise InvalidRequestError(message, "priority")
    return priority


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str | dict) or not isinstance(prompts, Iterable):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and isinstance(items[0], int):
        return [items]
    return items
