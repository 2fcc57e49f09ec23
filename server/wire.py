"""What the front-ends and the engine's process say to each other, as bytes on a local socket.

A frame is its length, 4 bytes big-endian, and so many bytes of msgpack: a list of the message's
name and its fields. Msgpack holds plain values only, so nothing that arrives can run code. Whoever
gets a frame that is no message closes the connection.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from jaxserve.engine.request import TokenLogprobs
from jaxserve.errors import JaxserveError

MAX_FRAME_BYTES = 64 * 2**20
"""Largest payload. A prompt of a million tokens takes 5 MB; log-probabilities of a long output that
nobody read meanwhile take the most."""
HEADER = struct.Struct(">I")

EXIT_FAILED, EXIT_CANNOT_START, EXIT_HUNG, EXIT_ORPHAN = 1, 3, 4, 5
"""How the engine's process ends: a step failed again and again; no engine could be made of the
settings; a step hung; the parent has gone."""


class WireError(JaxserveError):
    """What arrived is no message."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Front-end: begin a generation. ``params`` are those of SamplingParams' fields that differ
    from their defaults; ``queue_timeout_s`` the longest wait for a row and pages."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    cache_salt: str
    priority: int
    queue_timeout_s: float


@dataclass(frozen=True, slots=True)
class Abort:
    """Front-end: end generations and embeddings. Those that ended already are no error."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Embed:
    """Front-end: one vector for a prompt. Answered by a Reply."""

    request_id: str
    prompt_token_ids: list[int]
    pooling: str
    queue_timeout_s: float


@dataclass(frozen=True, slots=True)
class GetStats:
    """Front-end: what are the counters? Answered by a Reply."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Reply:
    """Engine: the answer to an Embed or a GetStats; an ``error`` as in ``Event`` instead of a value
    if there is none."""

    request_id: str
    value: Any
    error: list[Any] | None


@dataclass(frozen=True, slots=True)
class Starting:
    """Engine: what it does before it can serve; ``eta_s`` is the rest of this stage in seconds."""

    stage: str
    done: int
    total: int
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Ready:
    """Engine: requests can come; ``info`` are EngineInfo's fields."""

    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Engine, every second: the engine's loop last made progress so many seconds ago, or is
    ``compiling`` a program that the step needs."""

    stalled_s: float
    num_running: int
    num_waiting: int
    compiling: bool


class Event(NamedTuple):
    """News of one generation; of one whose reader is slow, of several steps.

    Attributes:
        request_id: the front-end's.
        token_ids: the new tokens.
        logprobs: TokenLogprobs of each new token; None for who didn't ask. They travel as
            [token id, log-probability, rank, [[token id, log-probability], ...]].
        finish_reason: why it ended, if it did.
        stop_reason: the token id that ended it, if one did.
        num_cached_tokens: prompt tokens that the prefix cache spared, in the first event.
        prompt_logprobs: the same of the prompt's tokens but the first, once.
        error: [kind, message, field at fault or None]; see the kinds below.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[Any] | None = None
    error: list[Any] | None = None


INVALID, OVERLOADED, FAILED = "invalid", "overloaded", "failed"
"""Kinds of errors: it can't be served; it waited too long; it failed while it ran."""


NOTHING_ELSE = (None,) * (len(Event._fields) - 2)
"""What an event tells besides tokens, if it tells of nothing else."""


@dataclass(frozen=True, slots=True)
class Events:
    """Engine: news of generations. ``tokens`` are those of which there is nothing else to tell, by
    request id, which are nearly all; the others are each an ``Event`` as a list."""

    tokens: dict[str, Any]
    events: list[Any]


Message = Submit | Abort | Embed | GetStats | Reply | Starting | Ready | Heartbeat | Events
FROM_FRONT_END = (Submit, Abort, Embed, GetStats)
FROM_ENGINE = (Reply, Starting, Ready, Heartbeat, Events)
_CLASSES = {cls.__name__: cls for cls in (*FROM_FRONT_END, *FROM_ENGINE)}


def encode(message: Message) -> bytes:
    """The frame of a message, header included.

    Raises:
        WireError: it is too large, or a value in it can't travel.
    """
    cls: type = type(message)
    fields = [getattr(message, name) for name, _ in _fields(cls)]
    try:
        payload: bytes = msgpack.packb([cls.__name__, *fields], default=_plain)
    except (TypeError, ValueError, OverflowError) as error:  # lone surrogates, large integers
        raise WireError(f"a {cls.__name__} can't be sent ({type(error).__name__})") from error
    if len(payload) > MAX_FRAME_BYTES:
        raise WireError(f"a {type(message).__name__} of {len(payload)} bytes is too large to send")
    return HEADER.pack(len(payload)) + payload


def payload_size(header: bytes) -> int:
    """How many bytes follow a frame's header.

    Raises:
        WireError: more than may come, or the header was cut off.
    """
    if len(header) != HEADER.size:
        raise WireError("a frame ends in its header")
    size: int = HEADER.unpack(header)[0]
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {size} bytes is larger than {MAX_FRAME_BYTES}")
    return size


class Frames:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of a frame
        self._wanted = 0  # bytes until more of it is known, that beginning included

    def add(self, data: bytes) -> Iterator[memoryview]:
        """The payloads that are whole with this.

        Raises:
            WireError: a frame is larger than may come.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data = bytes(self._rest)
            self._rest.clear()
        view, start, self._wanted = memoryview(data), 0, HEADER.size
        while len(data) - start >= HEADER.size:
            first = start + HEADER.size
            end = first + payload_size(data[start:first])
            if end > len(data):
                self._wanted = end - start
                break
            yield view[first:end]
            start = end
        self._rest += view[start:]


def decode(payload: bytes | memoryview) -> Message:
    """The message in a frame's payload.

    Raises:
        WireError: there is none in it, or its fields have the wrong types.
    """
    try:
        name, *values = msgpack.unpackb(payload, strict_map_key=False)
        cls = _CLASSES[name]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError(f"a frame is no message ({type(error).__name__})") from error
    fields = _fields(cls)
    if len(values) != len(fields):
        raise WireError(f"a {name} has {len(fields)} fields, not {len(values)}")
    for (field, kind), value in zip(fields, values):
        if not _conforms(value, kind):
            raise WireError(f"the {field} of a {name} is of the wrong type")
    return cls(*values)


def logprobs(fields: list[Any]) -> list[TokenLogprobs]:
    """What ``Event`` holds of log-probabilities, from what came of it.

    Raises:
        TypeError, ValueError: it has another form.
    """
    return [
        TokenLogprobs(token_id, logprob, rank, tuple((one, value) for one, value in top))
        for token_id, logprob, rank, top in fields
    ]


def _plain(value: Any) -> list[Any]:
    """What travels instead of a value that msgpack doesn't know."""
    if not isinstance(value, TokenLogprobs):
        raise TypeError(f"a {type(value).__name__} can't be sent")
    return [value.token_id, value.logprob, value.rank, value.top]


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
    """Names and types of a message's fields."""
    hints = typing.get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


def _conforms(value: Any, kind: Any) -> bool:
    """Whether a decoded value is of a field's type."""
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float)
    if isinstance(kind, types.UnionType):
        return any(_conforms(value, one) for one in kind.__args__)
    origin = typing.get_origin(kind)
    if origin is list:
        (item,) = typing.get_args(kind)
        return type(value) is list and (item is Any or all(type(one) is item for one in value))
    if origin is dict:
        return type(value) is dict and all(type(key) is str for key in value)
    return bool(type(value) is kind)
