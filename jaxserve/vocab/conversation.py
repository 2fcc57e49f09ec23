"""What the tokenizers share whose models' own code builds conversations token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import InvalidRequestError

UNREAD = ("tools", "functions", "tool_calls", "function_call")
"""What messages may have for other models, and would be lost here."""


class ConversationTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that can also encode texts in which nothing is special, so that what users
    write can't become a special token in a conversation.

    Args:
        backend: of the tokenizers library.
        options: of the tokenizer of ``transformers``.
    """

    def __init__(self, backend: tokenizers.Tokenizer, **options: Any) -> None:
        super().__init__(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)
        self._plain = tokenizers.Tokenizer(backend.model)
        self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without special tokens, however it looks."""
        return self._plain.encode(text, add_special_tokens=False).ids


def texts_of(messages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(role, text) of each message.

    Raises:
        InvalidRequestError: a message has no text, or names tools or calls of them.
    """
    for index, message in enumerate(messages):
        unread = next((key for key in UNREAD if message.get(key)), None)
        if unread is not None:
            raise InvalidRequestError(
                f"messages[{index}]: {unread} is not supported for this model; write it into the "
                "content.",
                "messages",
            )
        if not isinstance(message.get("content"), str):
            raise InvalidRequestError(f"messages[{index}]: content must be a string.", "messages")
    return [(str(message.get("role")), message["content"]) for message in messages]
