"""Log-probabilities as OpenAI's two endpoints show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.outputs import Logprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON can't say."""
Entries = Mapping[int, Logprob]


def _text(token_id: int, entry: Logprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else entry.decoded_token or ""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)


class CompletionLogprobs:
    """The "logprobs" of a choice of /v1/completions, piece by piece.

    Args:
        show: a token as text.
        as_ids: show tokens as "token_id:N" instead.
    """

    def __init__(self, show: Callable[[int], str], as_ids: bool) -> None:
        self._show = show
        self._as_ids = as_ids
        self._offset = 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[Entries | None]) -> dict[str, Any]:
        """The next tokens; None where there is no log-probability, as for a prompt's first one."""
        shown: dict[str, list[Any]] = {
            name: [] for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        }
        for token_id, entries in zip(token_ids, logprobs):
            text = self._show(token_id)
            shown["text_offset"].append(self._offset)
            shown["tokens"].append(f"token_id:{token_id}" if self._as_ids else text)
            if entries is None:
                shown["token_logprobs"].append(None)
                shown["top_logprobs"].append(None)
            else:
                shown["token_logprobs"].append(_value(entries[token_id]))
                shown["top_logprobs"].append(
                    {_text(i, one, self._as_ids): _value(one) for i, one in entries.items()}
                )
            self._offset += len(text)
        return shown


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Entries], top: int, as_ids: bool
) -> dict[str, Any]:
    """The "logprobs" of a choice of /v1/chat/completions.

    Args:
        top: how many of the likeliest tokens to show at each place.
        as_ids: show tokens as "token_id:N".
    """

    def show(token_id: int, entry: Logprob) -> dict[str, Any]:
        text = _text(token_id, entry, as_ids)
        bytes_ = list((entry.decoded_token or "").encode("utf-8", "replace"))
        return {"token": text, "logprob": _value(entry), "bytes": bytes_}

    content = [
        {
            **show(token_id, entries[token_id]),
            "top_logprobs": [show(*item) for item in list(entries.items())[:top]],
        }
        for token_id, entries in zip(token_ids, logprobs)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(positions: Sequence[Entries | None]) -> list[dict[str, Any] | None]:
    """The "prompt_logprobs" of a choice: per prompt token, None for the first."""
    return [
        None
        if entries is None
        else {
            str(token_id): {
                "logprob": _value(entry),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in entries.items()
        }
        for entries in positions
    ]
