"""TeleChat's tokenizers: SentencePiece models.

The facts are those of tokenization_telechat.py of Tele-AI/TeleChat-12B.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jaxserve.vocab import Files, required, token_text
from jaxserve.vocab.sentence_piece import read_model, sentence_piece_bpe


def read(files: Files, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint. What stands between special tokens is encoded by itself."""
    backend = sentence_piece_bpe(read_model(required(files, "tokenizer.model")), ())
    ends = {"bos_token": "<_start>", "eos_token": "<_end>", "pad_token": "<_pad>"}
    ends = {name: token_text(settings.get(name)) or default for name, default in ends.items()}
    if settings.get("add_bos_token", True):
        bos = ends["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **ends,
    )
