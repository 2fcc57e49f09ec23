"""The tokenizers of ChatGLM2, ChatGLM3 and GLM-4-9B as first published.

The facts are those of tokenization_chatglm.py of THUDM/chatglm2-6b, THUDM/chatglm3-6b and
THUDM/glm-4-9b-chat. All of them begin every text with two special tokens. In conversations, text
never becomes a special token, however it looks; in other prompts it does, except in ChatGLM2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from jaxserve.chat_templates import built_in
from jaxserve.errors import InvalidRequestError
from jaxserve.vocab import Files, required
from jaxserve.vocab.byte_bpe import byte_bpe, read_ranks
from jaxserve.vocab.conversation import ConversationTokenizer, texts_of
from jaxserve.vocab.sentence_piece import read_model, sentence_piece_bpe

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "observation")},
    "tool": "observation",  # OpenAI's name for it
}
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
CHATGLM2 = (*MASKS, "sop", "eop")
CHATGLM3 = (*CHATGLM2, *TURNS)
GLM_4 = ("<|endoftext|>", *MASKS, "<sop>", "<eop>", *TURNS, *MEDIA)
ENDS = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>"}
GLM_4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(files: Files, settings: dict[str, Any]) -> ChatGLMTokenizer:
    """The tokenizer of a checkpoint; all three call their file "tokenizer.model"."""
    path = required(files, "tokenizer.model")
    kind: type[ChatGLM2Tokenizer | ChatGLM3Tokenizer | GLM4Tokenizer] = GLM4Tokenizer
    if settings["tokenizer_class"] == "ChatGLMTokenizer":
        kind = ChatGLM3Tokenizer if _has_turns(files) else ChatGLM2Tokenizer
    options = {key: settings[key] for key in ("model_max_length",) if key in settings}
    template = settings.get("chat_template") or built_in(kind.template)
    return kind(path, chat_template=template, **options)


def _has_turns(files: Files) -> bool:
    """Whether this is ChatGLM3. Its vocabulary and its classes' names are those of ChatGLM2, so
    what tells is any file that names its special tokens, or the model's own name."""
    for name in ("tokenizer_config.json", "config.json", "tokenization_chatglm.py"):
        path = files(name)
        text = path.read_text(encoding="utf-8", errors="replace").lower() if path else ""
        if TURNS[1] in text or "chatglm3" in text:
            return True
    return False


class ChatGLMTokenizer(ConversationTokenizer):
    """A fast tokenizer.

    Args:
        backend: of the tokenizers library.
        specials: the special tokens, whose ids are the last ones.
    """

    template: str
    """The name of its built-in chat template."""

    def __init__(
        self, backend: tokenizers.Tokenizer, specials: Sequence[str], **options: Any
    ) -> None:
        first = backend.get_vocab_size() - len(specials)
        special = {name.strip("<>|"): first + i for i, name in enumerate(specials)}
        start = [special["[gMASK]"], special["sop"]]
        names = [backend.id_to_token(token) for token in start]
        backend.post_processor = TemplateProcessing(
            single=[*names, "$A"],
            pair=[*names, "$A", "$B"],
            special_tokens=list(zip(names, start)),
        )
        super().__init__(backend, **options)
        self._special, self._start = special, start

    def _turns(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        skip_empty: bool = False,
    ) -> list[int]:
        """Conversations of ChatGLM3 and later, see there."""
        ids = list(self._start)
        for (role, text), message in zip(texts_of(messages), messages):
            if role not in ROLES:
                raise InvalidRequestError(
                    f"messages: this model knows the roles {', '.join(ROLES)}; not {role[:60]!r}.",
                    "messages",
                )
            if skip_empty and not text:
                continue
            ids.append(self._special[ROLES[role]])
            ids += self.encode_plain(f"{message.get('metadata') or ''}\n")
            ids += self.encode_plain(text)
        return [*ids, self._special["assistant"]] if add_generation_prompt else ids


class ChatGLM2Tokenizer(ChatGLMTokenizer):
    """Conversations are numbered rounds, which are encoded as one text."""

    template = "chatglm2"

    def __init__(self, path: Path, **options: Any) -> None:
        backend = sentence_piece_bpe(read_model(path), CHATGLM2)
        super().__init__(backend, CHATGLM2, split_special_tokens=True, **ENDS, **options)

    def conversation_ids(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, as ``build_prompt`` makes them; the model knows no system
        messages, and openai_api.py of THUDM/ChatGLM2-6B puts one before the last question.

        Raises:
            InvalidRequestError: a message has no text, or the roles aren't system (at most one, the
                first), then user and assistant in turn.
        """
        texts = texts_of(messages)
        system = texts.pop(0)[1] if texts and texts[0][0] == "system" else ""
        for index, (role, _) in enumerate(texts):
            if role != ("user", "assistant")[index % 2]:
                raise InvalidRequestError(
                    "messages: this model wants user and assistant in turn, the user first, and at "
                    "most one message of system before them.",
                    "messages",
                )
        asked = len(texts) % 2 == 1
        if not texts or (add_generation_prompt and not asked):
            raise InvalidRequestError("messages: the last one must be a user's.", "messages")
        last_question = (len(texts) - 1) // 2
        prompt = ""
        for index in range(0, len(texts), 2):
            question = (system if index // 2 == last_question else "") + texts[index][1]
            prompt += f"[Round {index // 2 + 1}]\n\n问：{question}\n\n"
            if index + 1 < len(texts):
                prompt += f"答：{texts[index + 1][1]}\n\n"
        if add_generation_prompt:
            prompt += "答："
        if continue_final_message:
            prompt = prompt.removesuffix("\n\n")
        return self._start + self.encode_plain(prompt)


class ChatGLM3Tokenizer(ChatGLMTokenizer):
    """Each message is a special token for its role, a line for "metadata", and its text.

    Answers have such a line too: they begin with "\\n ", or with a tool's name before that. The
    model's own ``chat`` strips it; here it stays, as the part of the answer that it is.
    """

    template = "chatglm3"

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(
            sentence_piece_bpe(read_model(path), CHATGLM3), CHATGLM3, **ENDS, **options
        )

    def conversation_ids(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, as ``build_single_message`` makes them: a message's first
        line and its text are encoded by themselves.

        Raises:
            InvalidRequestError: a message has no text, a role that the model doesn't know, or tools
                beside its text.
        """
        return self._turns(messages, add_generation_prompt)


class GLM4Tokenizer(ChatGLMTokenizer):
    """The same with another vocabulary; messages without text are left out."""

    template = "glm-4"

    def __init__(self, path: Path, **options: Any) -> None:
        backend = byte_bpe(read_ranks(path), GLM_4_PATTERN, GLM_4)
        super().__init__(backend, GLM_4, eos_token=GLM_4[0], pad_token=GLM_4[0], **options)

    def conversation_ids(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, as ChatGLM3 makes them. Raises what it raises."""
        return self._turns(messages, add_generation_prompt, skip_empty=True)
