"""Trains small SentencePiece models."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece


def train_bpe(sentences: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """A model of the BPE kind with the settings that published ones have in common."""
    model = io.BytesIO()
    common: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        **(common | options),
    )
    return model.getvalue()
