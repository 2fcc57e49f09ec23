"""Llama's tokenizer where there is only its SentencePiece model, as in Vicuna's checkpoints.

``transformers`` reads these too, but needs the packages sentencepiece and protobuf for it.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaTokenizer

from jaxserve.vocab import Files, token_text
from jaxserve.vocab.sentence_piece import merges, read_model

TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")
SWITCHES = ("legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "model_max_length")


def read(files: Files, settings: dict[str, Any]) -> LlamaTokenizer | None:
    """The tokenizer of a checkpoint; None if it has more tokens than its SentencePiece model, or no
    such model, and is left to ``transformers``."""
    path = files("tokenizer.model")
    if path is None or files("added_tokens.json") is not None:
        return None
    model = read_model(path)
    more = settings.get("added_tokens_decoder") or {}
    if any(not index.isdigit() or int(index) >= len(model.pieces) for index in more):
        return None
    tokens = {name: text for name in TOKENS if (text := token_text(settings.get(name)))}
    return LlamaTokenizer(
        vocab={text: index for index, (text, _, _) in enumerate(model.pieces)},
        merges=merges(model),
        chat_template=settings.get("chat_template"),
        **tokens,
        **{name: settings[name] for name in SWITCHES if settings.get(name) is not None},
    )
