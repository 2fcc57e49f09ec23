"""Typed access to the values of a config.json, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxserve.errors import CheckpointError, UnsupportedModelError

T = TypeVar("T")
REQUIRED: Any = object()


class Fields:
    """The entries of one JSON object. A null counts as absent, as in transformers.

    Every method raises a CheckpointError that names the key when the value is missing without a
    default, has the wrong type, or lies outside of the bounds.

    Attributes:
        values: the JSON object.
        where: its name in messages, for example "config.json" or "config.json: rope_scaling".
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """An error that says what ``key`` should have been."""
        if key not in self:
            return CheckpointError(f"{self.where}: {key} is missing; expected {expected}.")
        shown = repr(self.values[key])
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        return CheckpointError(f"{self.where}: {key} is {shown}; expected {expected}.")

    def named(self, *keys: str) -> str:
        """The first of a key's several spellings that is there; the very first if none is."""
        return next((key for key in keys if key in self), keys[0])

    def integer(
        self, key: str, default: T = REQUIRED, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int | T:
        """An integer within the bounds, both inclusive; 32.0 counts as 32."""
        if key not in self and default is not REQUIRED:
            return default
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(
        self,
        key: str,
        default: T = REQUIRED,
        above: float = 0.0,
        maximum: float = 1e12,
        or_zero: bool = False,
    ) -> float | T:
        """A finite number greater than ``above`` and at most ``maximum``, or, if allowed, zero."""
        if key not in self and default is not REQUIRED:
            return default
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        allowed = above < value <= maximum or (or_zero and value == 0)
        if not math.isfinite(value) or not allowed:
            raise self.wrong(key, f"a number above {above:g}, at most {maximum:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        if key not in self:
            return default
        if not isinstance(self.values[key], bool):
            raise self.wrong(key, "true or false")
        return self.values[key]

    def choice(self, key: str, meanings: Mapping[str, T], default: str) -> T:
        """What one of several words means.

        Raises:
            UnsupportedModelError: it is another word.
        """
        word = self.values[key] if key in self else default
        if not isinstance(word, str):
            raise self.wrong(key, "a string")
        if word not in meanings:
            raise UnsupportedModelError(
                f"{self.where}: {key}={word[:60]!r} is not supported; supported are "
                f"{', '.join(meanings)}."
            )
        return meanings[word]

    def words(self, key: str) -> list[str] | None:
        """A list of strings, or None."""
        if key not in self:
            return None
        value = self.values[key]
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.wrong(key, "a list of strings")
        return value

    def integers(self, key: str) -> list[int]:
        """A list of integers, none of them negative; an empty one if it is absent."""
        values = self.values[key] if key in self else []
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise self.wrong(key, "a list of integers, none of them negative")
        return values

    def numbers(self, key: str) -> list[float]:
        """A list of positive numbers."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(
            type(each) in (int, float) and 0 < each <= 1e12 for each in values
        ):
            raise self.wrong(key, "a list of positive numbers")
        return [float(each) for each in values]

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one integer, a list of them, or nothing."""
        value = self.values[key] if key in self else []
        value = value if isinstance(value, list) else [value]
        if not all(type(each) is int and each >= 0 for each in value):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(value)

    def section(self, key: str) -> Fields | None:
        """A nested JSON object, or None if it is absent or empty."""
        if key not in self:
            return None
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return Fields(value, f"{self.where}: {key}") if value else None

    def reject(self, keys: Iterable[str], reason: str) -> None:
        """Refuses a feature that we don't have.

        Raises:
            UnsupportedModelError: one of the keys is there.
        """
        for key in keys:
            if key in self:
                raise UnsupportedModelError(f"{self.where}: {key} is set, but {reason}")
