"""What all replies have in common."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from jaxserve import __version__

FINGERPRINT = f"jaxserve-{__version__}"
_IDS = random.Random()


def json_response(payload: Any, status: int = 200) -> web.Response:
    """A reply of JSON."""
    body = orjson.dumps(payload)
    return web.Response(body=body, status=status, content_type="application/json")


def new_id(prefix: str = "") -> str:
    """An id of which there is no other. It names a request in logs and replies and opens nothing,
    so it may be guessed: the system's random numbers cost a call to it each."""
    return f"{prefix}{_IDS.getrandbits(128):032x}"


def head(request_id: str, kind: str, model: str) -> dict[str, Any]:
    """The fields with which a reply and each of its chunks begin."""
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def usage_chunk(start: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    """The chunk that ends a stream with ``stream_options.include_usage``."""
    return {**start, "choices": [], "usage": usage}
