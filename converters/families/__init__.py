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
import re
from typing import Any, Protocol

from converters.fields import Fields
from converters.rules import Layout
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import ModelConfig

RECIPE = "notebooks/03_add_a_model_family.ipynb"


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
        UnsupportedModelError: there is none; the message says which one comes nearest.
    """
    fields = Fields(hf, "config.json")
    kind = hf.get("model_type")
    if not isinstance(kind, str):
        raise fields.wrong("model_type", f"one of {', '.join(names())}")
    architectures = fields.words("architectures") or []
    architecture = architectures[0] if architectures else kind
    if kind not in names():
        raise _unsupported(architecture, kind)
    family = _family(kind)
    if architectures and architecture not in family.ARCHITECTURES:
        raise _unsupported(architecture, kind)
    return family


def _family(kind: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{kind}")
    return family


def layout_of(family: Any, config: ModelConfig) -> Layout:
    """The renaming rules of a family for one of its models."""
    layout: Layout = family.layout(config) if hasattr(family, "layout") else family.LAYOUT
    return layout


def more_end_tokens(
    family: Any, config: ModelConfig, generation: Fields, ids: tuple[int, ...]
) -> tuple[int, ...]:
    """End tokens that the family's models have besides those (``ids``) that their files list: of
    its function ``end_tokens(config, generation, ids)``, if it has one.

    Args:
        generation: generation_config.json.
    """
    return family.end_tokens(config, generation, ids) if hasattr(family, "end_tokens") else ()


def _unsupported(architecture: str, kind: str) -> UnsupportedModelError:
    nearest, its_kind = _nearest(architecture, kind)
    return UnsupportedModelError(
        f"The architecture {architecture[:200]!r} is not supported; the nearest supported one is "
        f"{nearest!r} (model_type {its_kind!r}). {RECIPE} shows how to add a family. Supported "
        f"model types: {', '.join(names())}."
    )


def _nearest(architecture: str, kind: str) -> tuple[str, str]:
    """The supported architecture, and its model_type, of which either looks most like these."""

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, _stem(one), _stem(other)).ratio()

    def rank(candidate: tuple[str, str]) -> tuple[float, float]:
        by_name, by_kind = likeness(architecture, candidate[0]), likeness(kind, candidate[1])
        return max(by_name, by_kind), by_name

    return max(((name, kind) for kind in names() for name in _family(kind).ARCHITECTURES), key=rank)


def _stem(name: str) -> str:
    """What tells architectures from each other."""
    return re.sub("(for_?causal_?lm|lm_?head_?model|model)$", "", name[:200].lower())
