"""Work on texts (tokenizing, templates, decoding) in threads, so that it never stops the loop."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenizer import Tokenizer
from server.engine_client import OverloadedError
from server.errors import context_length_exceeded
from server.protocol.chat import Conversation
from server.protocol.sampling import Options

Result = TypeVar("Result")
THREADS = 2
SMALL_CHARACTERS = 2000
"""A text of so few characters takes less time to encode than a thread takes to wake up."""


class Texts:
    """A tokenizer behind a small pool of threads with a bounded queue.

    Args:
        tokenizer: of the model; None if it has none, then everything here is refused.
        max_model_len: of the engine; longer texts are refused before they cost anything.
        max_queue: texts that may wait or be under way.
    """

    def __init__(self, tokenizer: Tokenizer | None, max_queue: int) -> None:
        self.tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="jaxserve-text")
        self._max_queue = max_queue
        self._pending = 0
        vocabulary = tokenizer.hf.get_vocab() if tokenizer is not None else {}
        self._longest_token = max(map(len, vocabulary), default=1)

    def close(self) -> None:
        """Ends the threads; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(
        self, texts: Sequence[str], add_special_tokens: bool, max_model_len: int, param: str
    ) -> list[list[int]]:
        """The token ids of each text.

        Raises:
            ApiError: one can't fit into the context, however it is cut into tokens.
            InvalidRequestError: there is no tokenizer.
            OverloadedError: too many texts wait already.
        """
        for text in texts:
            self.check_length(len(text), max_model_len, param)
        tokenizer = self._needed(param)

        def work() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens) for text in texts]

        if len(texts) == 1 and len(texts[0]) <= SMALL_CHARACTERS:
            return work()
        return await self.run(work)

    async def render(self, conversation: Conversation, max_model_len: int) -> list[int]:
        """The token ids of a conversation. Raises what ``encode`` raises, and
        InvalidRequestError if the template refuses."""
        self.check_length(conversation.characters, max_model_len, "messages")
        tokenizer = self._needed("messages")
        special = conversation.add_special_tokens

        def work() -> list[int]:
            return tokenizer.chat(conversation.messages, special, **conversation.template)[1]

        if conversation.is_brief and conversation.characters <= SMALL_CHARACTERS:
            return work()
        return await self.run(work)

    async def decode(self, token_ids: Sequence[int], param: str) -> str:
        """The text of token ids, special tokens included."""
        return await self.run(self._needed(param).decode, token_ids, False)

    async def show(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as text."""
        return await self.run(lambda: [self.token(token) for token in token_ids])

    def token(self, token_id: int) -> str:
        """One token as text; nothing without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.token(token_id)

    async def with_bad_words(self, options: Options) -> Options:
        """The options with the token ids of ``params.bad_words``."""
        words = options.params.bad_words
        if not words:
            return options
        ids = await self.run(self._needed("bad_words").bad_words, words)
        params = options.params.replace(bad_words_token_ids=ids)
        return dataclasses.replace(options, params=params)

    def check_length(self, characters: int, max_model_len: int, param: str) -> None:
        """Refuses a text that has more characters than the context's tokens can hold."""
        most = max_model_len * self._longest_token
        if characters > most:
            raise context_length_exceeded(
                f"{param} has {characters} characters, more than {max_model_len} tokens of context "
                "can hold; shorten it.",
                param,
            )

    async def run(self, work: Callable[..., Result], *args: Any) -> Result:
        """Runs ``work`` in a thread.

        Raises:
            OverloadedError: too much waits already.
        """
        if self._pending >= self._max_queue:
            raise OverloadedError("too many texts wait to be tokenized", 1)
        future = self._pool.submit(work, *args)
        self._pending += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _call_soon(loop, self._finished))
        return await asyncio.wrap_future(future)

    def _finished(self) -> None:
        self._pending -= 1

    def _needed(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            message = f"This model has no tokenizer, so {param} must be token ids."
            raise InvalidRequestError(message, param)
        return self.tokenizer


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)
