"""Fields of a JSON request, declared once: the check, the default and the OpenAPI schema.

Hand-written instead of pydantic or msgspec: most fields go straight to SamplingParams, which has
its own checks and messages, and a field that is known but unsupported needs an answer of its own,
which neither library offers. One table per route gives validation, refusal and documentation.

The policy: a field with a JSON null counts as absent; a field that a table doesn't hold is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError

Check = Callable[[str, Any], Any]
Schema = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One field of a request.

    Attributes:
        check: from (name, value) to the checked value; raises InvalidRequestError.
        schema: its JSON Schema, without the description.
        doc: its description.
        default: the value when it is absent or null.
        required: it may be neither.
    """

    check: Check
    schema: Schema
    doc: str
    default: Any = None
    required: bool = False


class Fields(dict[str, Field]):
    """The fields that a request may have, by name."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__(fields)
        self.defaults = {name: field.default for name, field in fields.items()}
        self.required = [name for name, field in fields.items() if field.required]


def read(fields: Fields, body: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of all fields, defaults included.

    Raises:
        InvalidRequestError: names the field, the rule and what came.
    """
    for name in body:
        if name not in fields:
            raise _unknown(name, fields)
    for name in fields.required:
        if body.get(name) is None:
            raise InvalidRequestError(f"{name} is missing; it is required.", name)
    # There are many fields and few in a request, so what is absent may cost nothing.
    values = fields.defaults.copy()
    for name, value in body.items():
        if value is not None:
            values[name] = fields[name].check(name, value)
    return values


def _unknown(name: str, fields: Fields) -> InvalidRequestError:
    near = difflib.get_close_matches(name[:64], fields, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    shown = short(name)
    message = f"There is no field {shown} in this request{hint} Fields are listed in /openapi.json."
    return InvalidRequestError(message, name if len(name) <= 64 else None)


# --- the kinds of fields ------------------------------------------------------------------------


def boolean(doc: str, default: bool = False) -> Field:
    """True or false."""

    def check(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise wrong(name, value, "must be true or false")
        return value

    return Field(check, {"type": "boolean", "default": default}, doc, default)


def integer(doc: str, low: int, high: int, default: int | None = None) -> Field:
    """A whole number from ``low`` to ``high``."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, value, "must be an integer")
        if not low <= value <= high:
            raise wrong(name, value, f"must be from {low} to {high}")
        return value

    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Field(check, schema, doc, default)


def text(doc: str, max_chars: int, *, min_chars: int = 0, required: bool = False) -> Field:
    """A string."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise wrong(name, value, "must be a string")
        if not min_chars <= len(value) <= max_chars:
            rule = f"must have {min_chars} to {max_chars} characters"
            raise wrong(name, f"{len(value)} characters", rule)
        return value

    schema = {"type": "string", "minLength": min_chars, "maxLength": max_chars}
    return Field(check, schema, doc, required=required)


def choice(doc: str, values: Sequence[str], default: str) -> Field:
    """One of a few strings."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise wrong(name, value, f"must be one of {', '.join(values)}")
        return value

    return Field(check, {"type": "string", "enum": list(values), "default": default}, doc, default)


def passed_on(doc: str, schema: Schema, default: Any = None, required: bool = False) -> Field:
    """Anything here; whoever uses it checks it."""
    return Field(lambda name, value: value, schema, doc, default, required)


def no_op(doc: str, max_chars: int = 4096) -> Field:
    """Accepted and without any effect, which the documentation says."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, str) and len(value) > max_chars:
            raise wrong(name, f"{len(value)} characters", f"must have at most {max_chars}")
        return value

    return Field(check, {}, f"No effect. {doc}")


def unsupported(why: str, neutral: Collection[Any] = (), schema: Schema | None = None) -> Field:
    """Known, but not to be had here: only the values that change nothing are accepted."""

    def check(name: str, value: Any) -> Any:
        # 1 == True in Python, but not in JSON.
        if any(value == one and type(value) is type(one) for one in neutral):
            return None
        allowed = " or ".join(repr_json(one) for one in neutral)
        remedy = f"leave it out or set it to {allowed}" if allowed else "leave it out"
        raise InvalidRequestError(f"{name} is not supported: {why}; {remedy}.", name)

    return Field(check, schema or {}, f"Not supported: {why}.")


# --- messages -----------------------------------------------------------------------------------


def wrong(name: str, value: Any, rule: str) -> InvalidRequestError:
    """The error for a value that breaks a rule."""
    return InvalidRequestError(f"{name} {rule}, got {short(value)}.", name)


def short(value: Any) -> str:
    """A value in a message: one line, never long, and never all of a long value read."""
    if isinstance(value, list | dict) and len(value) > 16:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} items"
    shown = repr(value[:80] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def repr_json(value: Any) -> str:
    """A neutral value as JSON spells it."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def object_schema(fields: Fields) -> Schema:
    """The JSON Schema of a request with these fields."""
    schema: Schema = {
        "type": "object",
        "properties": {name: {**f.schema, "description": f.doc} for name, f in fields.items()},
        "additionalProperties": False,
    }
    return {**schema, "required": fields.required} if fields.required else schema
