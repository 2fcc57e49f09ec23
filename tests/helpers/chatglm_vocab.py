"""Small tokenizers of ChatGLM2, ChatGLM3 and GLM-4-9B in their published files, and the published
rules of their conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex
import sentencepiece

from tests.helpers.byte_ranks import CORPUS, RANKS, merged, ranks_file
from tests.helpers.conversations import conversation
from tests.helpers.sentence_pieces import train_bpe

GLM_4_PATTERN = regex.compile(
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SENTENCES = [
    *CORPUS.split("\n"),
    "[Round 1]\n\n问：你好吗\n\n答：我很好，谢谢！",
    "philosophy sop shop ababab abababab ------- aaaaaaa",
] * 20
KINDS = ("chatglm2", "chatglm3", "glm-4")
CHATGLM2 = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM_4 = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
MEDIA = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]


def train(sentences: Sequence[str] = SENTENCES, **changes: Any) -> bytes:
    """A SentencePiece model with the settings that ChatGLM's has."""
    options: dict[str, Any] = {
        "vocab_size": 420,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
    }
    return train_bpe(sentences, **(options | changes))


MODEL = train()
LIBRARY = sentencepiece.SentencePieceProcessor(model_proto=MODEL)


def write(directory: Path, model: bytes = MODEL, **config: Any) -> str:
    """A checkpoint's tokenizer files."""
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLMTokenizer", "model_max_length": 99, **config})
    )
    return str(directory)


def write_kind(directory: Path, kind: str) -> str:
    """The files of one of ``KINDS``."""
    if kind == "glm-4":
        return write(directory, ranks_file().encode(), tokenizer_class="ChatGLM4Tokenizer")
    return write(directory, name_or_path=f"THUDM/{kind}-6b")


def plain(kind: str, text: str) -> list[int]:
    """The tokens of a text in which nothing is special."""
    if kind != "glm-4":
        return LIBRARY.encode(text)
    return [token for match in GLM_4_PATTERN.findall(text) for token in merged(match.encode())]


def special(kind: str, *names: str) -> list[int]:
    """The ids of special tokens, which follow the vocabulary in the published order."""
    order = {"chatglm2": CHATGLM2, "chatglm3": CHATGLM2 + ROLES, "glm-4": GLM_4 + MEDIA}[kind]
    first = len(RANKS) if kind == "glm-4" else LIBRARY.vocab_size()
    return [first + order.index(name) for name in names]


def start(kind: str) -> list[int]:
    return special(kind, "[gMASK]", "<sop>" if kind == "glm-4" else "sop")


def published_chatglm2(query: str, history: Sequence[tuple[str, str]]) -> list[int]:
    """build_prompt, then the tokenizer's call."""
    rounds = [
        f"[Round {i}]\n\n问：{old}\n\n答：{answer}\n\n"
        for i, (old, answer) in enumerate(history, start=1)
    ]
    prompt = "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："
    return start("chatglm2") + LIBRARY.encode(prompt)


def published_turns(kind: str, messages: Sequence[dict[str, str]]) -> list[int]:
    """build_single_message of each, and the tokens before and after."""
    ids = start(kind)
    for each in messages:
        ids += special(kind, f"<|{each['role']}|>")
        ids += plain(kind, f"{each.get('metadata', '')}\n") + plain(kind, each["content"])
    return ids + special(kind, "<|assistant|>")


def published_prompt(kind: str, query: str, history: Sequence[tuple[str, str]]) -> list[int]:
    """The tokens of a conversation without system message, ready for the answer."""
    if kind == "chatglm2":
        return published_chatglm2(query, history)
    return published_turns(kind, conversation(history, query))
