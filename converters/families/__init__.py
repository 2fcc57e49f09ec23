"""Model families: one file per ``model_type`` of Hugging Face's config.json, found by its name.

A family file holds

    ARCHITECTURES   the values of config.json's "architectures" that it covers
    config(hf)      from the parsed config.json to a ModelConfig
    LAYOUT          the renaming rules, see converters/rules.py; or a function layout(config) where
                    they depend on the config

To add a family, add such a file. Files whose names begin with "_" hold what families share.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any, Protocol

from converters.fields import Fields
from converters.rules import Layout
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import ModelConfig


class Family(Protocol):
    """What a family file offers."""

    ARCHITECTURES: tuple[str, ...]

    def config(self, hf: dict[str, Any]) -> ModelConfig:
        """Reads a config.json.

        Raises:
            CheckpointError: a value is missing or makes no sense; the message names its key.
            UnsupportedModelError: it asks for a feature that we don't have.
        """


def names() -> list[str]:
    """The supported values of ``model_type``."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(hf: dict[str, Any]) -> Family:
    """The family of a parsed config.json.

    Only ``model_type`` and ``architectures`` are looked at: code that a checkpoint brings along
    ("auto_map") is never loaded.

    Raises:
        UnsupportedModelError: there is none; the message says which name comes nearest.
    """
    fields = Fields(hf, "config.json")
    kind = hf.get("model_type")
    if not isinstance(kind, str):
        raise fields.wrong("model_type", f"one of {', '.join(names())}")
    architectures = fields.words("architectures") or []
    supported = names()
    if kind not in supported:
        raise _unsupported(", ".join(architectures) or kind, kind, supported)
    family: Family = importlib.import_module(f"{__name__}.{kind}")
    if architectures and architectures[0] not in family.ARCHITECTURES:
        raise _unsupported(architectures[0], architectures[0], list(family.ARCHITECTURES))
    return family


def layout_of(family: Any, config: ModelConfig) -> Layout:
    """The renaming rules of a family for one of its models."""
    layout: Layout = family.layout(config) if hasattr(family, "layout") else family.LAYOUT
    return layout


def _unsupported(shown: str, name: str, known: list[str]) -> UnsupportedModelError:
    (nearest,) = difflib.get_close_matches(name, known, 1, cutoff=0.0) or known[:1]
    return UnsupportedModelError(
        f"The architecture {shown[:200]!r} is not supported; the nearest supported "
        f"name is {nearest!r}. Supported model types: {', '.join(names())}. To add a family, add "
        "one file to converters/families/, named after its model_type."
    )
