"""A request body as a JSON object, strictly."""

from __future__ import annotations

from typing import Any

import orjson

from jaxserve.errors import InvalidRequestError

MAX_DEPTH = 64
"""Nesting beyond this is refused: no request needs it, and code that walks a value may recurse."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    orjson refuses what RFC 8259 refuses (NaN, infinities, lone surrogates, bytes that are no
    UTF-8). Of a key that stands twice, the last one counts.

    Raises:
        InvalidRequestError: it is no JSON, no object, or nested too deeply.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    # Counting brackets is an upper bound that spares most bodies the walk.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise InvalidRequestError(f"The body is nested more than {MAX_DEPTH} levels deep.")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether containers are nested deeper than ``depth``, found level by level."""
    level = [value]
    for _ in range(depth):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
