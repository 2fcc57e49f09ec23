"""Chat templates for models that bring none, as Jinja files named after their format."""

from __future__ import annotations

import re
from pathlib import Path

from jaxserve.errors import ConfigError

FOLDER = Path(__file__).parent
MARKS = ("{{", "{%", "\n")


def names() -> list[str]:
    """The names of the templates."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def built_in(name: str) -> str:
    """The template of one of ``names``."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def text_of(given: str) -> str:
    """The template that a user means: its text, the name of one of these, or a Jinja file.

    Raises:
        ConfigError: it is none of them.
    """
    if any(mark in given for mark in MARKS):
        return given
    if given in names():
        return built_in(given)
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template={given!r} is neither a file that can be read nor a template nor one of "
            f"{', '.join(names())}: {error}."
        ) from error


def certain_for(model: str) -> str | None:
    """The name of the template of a model that brings none, where the model's own name or path
    tells for certain: Vicuna from version 1.1 on."""
    parts = Path(model).parts
    cached = [part for part in parts if part.startswith("models--")]  # the hub's cache folders
    found = re.search(r"vicuna-\d+b-v1\b|vicuna-\d+b-v1_", " ".join([*cached, *parts[-1:]]), re.I)
    return "vicuna" if found else None
