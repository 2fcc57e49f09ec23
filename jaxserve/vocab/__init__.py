"""Tokenizers that published checkpoints bring as Python code: readers of our own for their files.

Code of a checkpoint is never run. A reader is chosen by the name of the tokenizer class that
tokenizer_config.json asks for, and gives a fast tokenizer of ``transformers``. If the model's own
code builds a conversation's tokens piece by piece, the tokenizer has a method

    conversation_ids(messages, add_generation_prompt, continue_final_message) -> list[int]

which ``jaxserve.tokenizer.Tokenizer.chat`` uses.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve import log
from jaxserve.errors import CheckpointError

READERS = {
    "ChatGLM4Tokenizer": "chatglm",
    "ChatGLMTokenizer": "chatglm",
    "LlamaTokenizer": "llama",
    "LlamaTokenizerFast": "llama",
    "QWenTokenizer": "qwen",
    "Telechat2Tokenizer": "telechat",
    "Telechat3Tokenizer": "telechat",
    "TelechatTokenizer": "telechat",
}
"""The module of this package that reads the files of a tokenizer class: its function
``read(files, settings)``, where ``files`` gives the path of a file by its name (None if there is
none) and ``settings`` is tokenizer_config.json."""

Files = Callable[[str], Path | None]


def open_vocabulary(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint that has no files for ``transformers`` itself, or None where
    ``transformers`` can read it (or nobody here can).

    Args:
        path: a directory or hub id.
        revision: branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: its files are missing or damaged.
    """

    def files(name: str) -> Path | None:
        from transformers.utils import cached_file

        found = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    settings = read_json(files, "tokenizer_config.json")
    kind = settings.get("tokenizer_class")
    if not isinstance(kind, str) or kind not in READERS:
        return None
    if files("tokenizer.json") is not None:  # somebody has converted it already
        return None
    if "auto_map" in settings:
        log.own_code_is_not_run(path, "tokenizer")
    return importlib.import_module(f"{__name__}.{READERS[kind]}").read(files, settings)


def read_json(files: Files, name: str) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    path = files(name)
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again.")
    return value


def required(files: Files, name: str) -> Path:
    """The path of a file.

    Raises:
        CheckpointError: there is none.
    """
    path = files(name)
    if path is None:
        raise CheckpointError(f"the tokenizer's file {name} is missing; download the model again.")
    return path


def token_text(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json, where it stands alone or with its settings."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
