"""A small tokenizer of Qwen 1 in its published files, and its published algorithms."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from tests.helpers.byte_ranks import PATTERN, RANKS, merged, ranks_file

END, TURN, TURN_END = range(len(RANKS), len(RANKS) + 3)


def plain(text: str) -> list[int]:
    """The tokens of a text in which nothing is special."""
    text = unicodedata.normalize("NFC", text)
    return [token for match in PATTERN.findall(text) for token in merged(match.encode())]


def write(directory: Path, **generation: Any) -> Path:
    """A checkpoint's tokenizer files."""
    directory.mkdir(exist_ok=True)
    (directory / "qwen.tiktoken").write_text(ranks_file())
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer", "auto_map": auto_map}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def published_context(
    query: str, history: list[tuple[str, str]], system: str, max_window_size: int
) -> list[int]:
    """The tokens of the published make_context for the format "chatml"."""
    newline = plain("\n")

    def message(role: str, content: str) -> list[int]:
        return [TURN, *plain(role), *newline, *plain(content), TURN_END]

    start, context = message("system", system), []
    for turn_query, turn_response in reversed(history):
        turn = newline + message("user", turn_query) + newline + message("assistant", turn_response)
        if len(start) + len(turn) + len(context) >= max_window_size:
            break
        context = turn + context
    end = [*newline, TURN, *plain("assistant"), *newline]
    return start + context + newline + message("user", query) + end
