"""Text to token ids and back: encoding, chat templates, and decoding token by token."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from jaxserve import chat_templates
from jaxserve.errors import CheckpointError, InvalidRequestError
from jaxserve.log import logger
from jaxserve.sampling.checks import MAX_BAD_WORD_TOKENS
from jaxserve.vocab.render import render

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are no whole character (yet)."""
CONTEXT = 6
"""Prompt tokens that a stream reads first, for decoders that treat a text's start specially."""
CONVERSATION_OPTIONS = {"add_generation_prompt", "continue_final_message"}
"""What conversations that the model's own code makes can be told; see ``jaxserve.vocab``."""
MAX_CHARACTER_TOKENS = 4
"""A UTF-8 character has at most four bytes, hence at most four byte tokens."""
NO = {"0", "NO", "OFF", "FALSE"}
"""``USE_TORCH``, with which earlier versions of ``transformers`` were told to leave torch alone."""
Decode = Callable[[list[int], bool], str]


class Tokenizer:
    """A checkpoint's tokenizer; wraps the one of ``transformers``.

    Args:
        path: a directory or hub id.
        revision: branch, tag or commit of a hub repository.
        chat_template: Jinja text that replaces the tokenizer's own.
    """

    def __init__(
        self, path: str, revision: str | None = None, chat_template: str | None = None
    ) -> None:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no torch is fine
        if os.environ.get("USE_TORCH", "").upper() in NO:
            _import_transformers_without_torch()
        from transformers import AutoTokenizer

        from jaxserve.vocab import open_vocabulary

        try:
            self.hf = open_vocabulary(path, revision)
            if self.hf is None:
                self.hf = AutoTokenizer.from_pretrained(path, revision=revision)
        except Exception as error:
            raise CheckpointError(
                f"No tokenizer could be loaded from {path}: {error}. Pass tokenizer=..., or "
                "skip_tokenizer_init=True to work with token ids."
            ) from error
        certain = chat_templates.certain_for(path)
        if chat_template is not None:
            self.hf.chat_template = chat_template
        elif not self.hf.chat_template and certain is not None:
            logger.info("%s has no chat template: the built-in %r is used.", path, certain)
            self.hf.chat_template = chat_templates.built_in(certain)
        self._fast = _fast(self.hf)
        own = getattr(self.hf, "conversation_ids", None)
        self._conversation_ids = own if chat_template is None and self.hf.chat_template else None

    def __len__(self) -> int:
        return len(self.hf)

    @cached_property
    def replacement_ids(self) -> list[int]:
        """The tokens of U+FFFD itself, which else stands for pieces of characters."""
        return self.encode(REPLACEMENT, add_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        fast = self._fast
        # Whoever was given ``hf`` may have told it to do more than that.
        if fast is None or fast.truncation or fast.padding or fast.encode_special_tokens:
            return self.hf.encode(text, add_special_tokens=add_special_tokens)
        return fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self.hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """One token as text, for showing log-probabilities."""
        return str(self.hf.decode([token_id], skip_special_tokens=False))

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences for ``SamplingParams.bad_words_token_ids``: each word as it begins a
        text, and as it follows a space unless that ends with the same tokens. (vLLM leaves out the
        latter also where the numbers of tokens differ, and so lets many words through.)

        Raises:
            InvalidRequestError: a word has more tokens than can be watched for.
        """
        sequences = []
        for word in words:
            bare, spaced = (
                tuple(self.encode(prefix + word.lstrip(), add_special_tokens=False))
                for prefix in ("", " ")
            )
            forms = [bare] if spaced[-len(bare) :] == bare else [bare, spaced]
            sequences += forms
            most = max(map(len, forms))
            if most > MAX_BAD_WORD_TOKENS:
                raise InvalidRequestError(
                    f"bad_words: {word!r} has {most} tokens; at most {MAX_BAD_WORD_TOKENS} can be "
                    "watched for.",
                    "bad_words",
                )
        return tuple(filter(None, sequences))

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
        """
        if not self.hf.chat_template:
            raise InvalidRequestError(
                "This tokenizer has no chat template. Pass chat_template=..., or use generate() "
                "with a prompt of your own.",
                "messages",
            )
        try:
            return render(self.hf, messages, options)
        except Exception as error:  # a template may raise anything, on purpose too
            message = f"The chat template refused the messages: {error}"
            raise InvalidRequestError(message, "messages") from error

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_special_tokens: bool = False,
        **options: Any,
    ) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and as token ids.

        The ids are those of the text, except where the model's own code makes them piece by piece
        (see ``jaxserve.vocab``) and nobody chose another template.

        Args:
            add_special_tokens: encode the text with the tokens that usually begin one; templates
                write them themselves.
            options: see ``apply_chat_template``.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages; or the model's
                own code doesn't know an option.
        """
        if self._conversation_ids is None or "chat_template" in options:
            text = self.apply_chat_template(messages, **options)
            return text, self.encode(text, add_special_tokens)
        options = {name: value for name, value in options.items() if value is not None}
        unknown = sorted(options.keys() - CONVERSATION_OPTIONS)
        if unknown:
            raise InvalidRequestError(
                f"{unknown[0]}: this model's conversations have no such option; leave it out (a "
                "message can describe tools), or pass a chat_template that reads it.",
                unknown[0],
            )
        ids = self._conversation_ids(messages, **options)
        return self.decode(ids, skip_special_tokens=False), ids

    def stream(self, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> TextStream:
        """A decoder for the tokens that follow a prompt."""
        fast = getattr(self.hf, "backend_tokenizer", None)
        if fast is None:
            return TextStream(self, prompt_ids, skip_special_tokens)
        return FastTextStream(self, fast, prompt_ids, skip_special_tokens)


class TextStream:
    """Decodes tokens one by one; text comes out as soon as its characters are whole.

    This one works with any tokenizer: it decodes a short window of tokens anew each time.

    Args:
        decode: makes the text of token ids, without special tokens if told so; by default the
            tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        decode: Decode | None = None,
    ) -> None:
        self._decode = tokenizer.decode if decode is None else decode
        self._skip = skip_special_tokens
        self._context, self._pending = _whole_characters(
            tokenizer, self._decode, prompt_ids, skip_special_tokens
        )

    def feed(self, token_id: int) -> str:
        """The text that a token completes; often a word, sometimes nothing."""
        self._pending.append(token_id)
        before = self._decode(self._context, self._skip)
        after = self._decode(self._context + self._pending, self._skip)
        if after.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = (self._context + self._pending)[-CONTEXT:], []
        return after[len(before) :]

    def flush(self) -> str:
        """What is left when the last token has come: pieces of characters, shown as U+FFFD."""
        pending, self._pending = self._pending, []
        return self._decode(pending, self._skip) if pending else ""


class FastTextStream(TextStream):
    """The same with the tokenizers library's own stream, at a microsecond per token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        fast: Any,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
    ) -> None:
        super().__init__(tokenizer, prompt_ids, skip_special_tokens, fast.decode)
        self._fast = fast
        self._step = self._new_stream(self._context).step
        held_back, self._pending = self._pending, []
        for token in held_back:
            self.feed(token)

    def feed(self, token_id: int) -> str:
        try:
            text: str | None = self._step(self._fast, token_id)
        except Exception:
            # The library gives up on some byte sequences ("Invalid prefix encountered"): what is
            # pending can't become a character any more.
            self._step = self._new_stream([]).step
            self._pending.append(token_id)
            return self.flush()
        if not text:
            self._pending.append(token_id)
            return ""
        if self._pending:
            self._pending.clear()
        return text

    def _new_stream(self, context: Sequence[int]) -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=list(context), skip_special_tokens=self._skip)


def _fast(hf: Any) -> Any:
    """The tokenizers library's object that encodes as ``hf`` does, in a third of the time and
    without waking other threads; None if ``hf`` has ways of its own."""
    from transformers import PreTrainedTokenizerFast

    own = any(
        getattr(type(hf), name, None) is not getattr(PreTrainedTokenizerFast, name)
        for name in ("encode", "_encode_plus", "set_truncation_and_padding")
    )
    if own or hf.split_special_tokens:
        return None
    hf.encode("")  # leaves out what tokenizer.json says of truncation and padding
    return hf.backend_tokenizer


def _whole_characters(
    tokenizer: Tokenizer, decode: Decode, prompt_ids: Sequence[int], skip_special: bool
) -> tuple[list[int], list[int]]:
    """The prompt's last tokens as (whole characters, the rest of a character cut in two).

    A stream that starts inside a character would give out prompt text once it is completed. So
    would one whose context ends with U+FFFD, even a real one: such a prompt gives no context.
    """
    tail = list(prompt_ids[-(CONTEXT + MAX_CHARACTER_TOKENS) :])
    for cut in range(min(MAX_CHARACTER_TOKENS, len(tail)) + 1):
        whole, rest = tail[: len(tail) - cut], tail[len(tail) - cut :]
        if not decode(whole, skip_special).endswith(REPLACEMENT):
            return whole[-CONTEXT:], rest
        real = tokenizer.replacement_ids
        if whole[-len(real) :] == real:
            return [], rest
    return [], []


def _import_transformers_without_torch() -> None:
    """Lets ``transformers`` find no torch, in this process and for good.

    It imports torch where that is installed: seconds and hundreds of MiB, for nothing that a
    tokenizer calls. Whether torch is there it asks once, when it is imported. Others may import
    torch afterwards.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # what importlib takes for "not found"
    try:
        import transformers.utils  # noqa: F401
    finally:
        del sys.modules["torch"]
