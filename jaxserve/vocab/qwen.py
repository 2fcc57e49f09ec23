"""Qwen 1's tokenizer: bytes in tiktoken's format, and conversations token by token.

The facts are those of tokenization_qwen.py and qwen_generation_utils.py of Qwen/Qwen-7B-Chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers.normalizers import NFC

from jaxserve.chat_templates import built_in
from jaxserve.errors import InvalidRequestError
from jaxserve.vocab import Files, read_json, required
from jaxserve.vocab.byte_bpe import byte_bpe, read_ranks
from jaxserve.vocab.conversation import ConversationTokenizer, texts_of

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, TURN, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
SYSTEM = "You are a helpful assistant."
WINDOW = 6144


def read(files: Files, settings: dict[str, Any]) -> QwenTokenizer:
    """The tokenizer of a Qwen 1 checkpoint. Chat models, those whose generation_config.json has
    chat_format "chatml", have a chat template too."""
    backend = byte_bpe(read_ranks(required(files, "qwen.tiktoken")), PATTERN, SPECIALS, NFC())
    generation = read_json(files, "generation_config.json")
    chats = generation.get("chat_format") == "chatml"
    window = generation.get("max_window_size")
    return QwenTokenizer(
        backend,
        window if isinstance(window, int) else WINDOW,
        model_max_length=settings.get("model_max_length", 8192),
        chat_template=built_in("qwen") if chats else None,
    )


class QwenTokenizer(ConversationTokenizer):
    """A fast tokenizer.

    Args:
        backend: of the tokenizers library.
        window: tokens that the system message and earlier turns may have in a conversation.
    """

    def __init__(self, backend: tokenizers.Tokenizer, window: int, **options: Any) -> None:
        super().__init__(
            backend,
            eos_token=END,
            additional_special_tokens=list(SPECIALS[1:]),
            **options,
        )
        self._window = window
        self._turn, self._turn_end = backend.encode(TURN + TURN_END).ids
        self._newline = self.encode_plain("\n")

    def conversation_ids(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, as ``make_context`` builds them.

        Each piece is encoded by itself. The system message and the last turn always stay; earlier
        turns are dropped, the oldest first, once together with the system message they fill the
        window.

        Raises:
            InvalidRequestError: a message has no text, tools beside it, or another role than system
                (only the first one), user or assistant.
        """
        system, turns = _turns(messages)
        start = self._message("system", system)
        history: list[int] = []
        for turn in reversed(turns[:-1]):
            tokens = [t for message in turn for t in self._newline + self._message(**message)]
            if len(start) + len(tokens) + len(history) >= self._window:
                break
            history = tokens + history
        ids = start + history
        for message in turns[-1]:
            ids += self._newline + self._message(**message)
        if continue_final_message:
            return ids[:-1]
        if add_generation_prompt:
            ids += [*self._newline, self._turn, *self.encode_plain("assistant"), *self._newline]
        return ids

    def _message(self, role: str, content: str) -> list[int]:
        header = [self._turn, *self.encode_plain(role), *self._newline]
        return [*header, *self.encode_plain(content), self._turn_end]


def _turns(messages: Sequence[dict[str, Any]]) -> tuple[str, list[list[dict[str, str]]]]:
    """The system message, and the others in turns that begin with a user's message each."""
    system, turns = SYSTEM, list[list[dict[str, str]]]()
    for index, (role, content) in enumerate(texts_of(messages)):
        if role == "system" and index == 0:
            system = content
        elif role not in ("user", "assistant"):
            raise InvalidRequestError(
                f"messages[{index}]: this model knows the roles user and assistant, and system for "
                f"the first message; not {role[:60]!r}.",
                "messages",
            )
        elif role == "user" or not turns:
            turns.append([{"role": role, "content": content}])
        else:
            turns[-1].append({"role": role, "content": content})
    if not turns:
        raise InvalidRequestError("messages: there is none of a user.", "messages")
    return system, turns
