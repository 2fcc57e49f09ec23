"""Reading a request's body: in time, in size, and as JSON."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from server.config import ServerConfig
from server.errors import ApiError
from server.protocol.json_body import parse_object

JSON_TYPES = ("application/json", "application/octet-stream")
"""The second is what aiohttp reports when a request names no type."""

SMALL_BYTES = 2**16
"""A body of so few bytes takes less time to parse than a thread takes to wake up."""


async def json_object(request: web.Request, config: ServerConfig) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        ApiError: 415 if it isn't said to be JSON, 408 if it doesn't come in time, 413 if it is too
            long.
        InvalidRequestError: it is no JSON object.
    """
    if request.content_type not in JSON_TYPES:
        shown = request.content_type[:80]
        raise ApiError(415, f"Send the body as application/json, not as {shown!r}.")
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "Compressed bodies are not accepted; send it as it is.")
    if (request.content_length or 0) > config.max_body_bytes:
        raise _too_large(config)
    try:
        if request.content.is_eof():  # it is here already: a timer costs as much as reading it
            body = await request.read()
        else:
            async with asyncio.timeout(config.read_timeout_s):
                body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(config) from None
    except TimeoutError:
        message = f"The body did not arrive within {config.read_timeout_s:g} s."
        raise ApiError(408, message) from None
    if len(body) <= SMALL_BYTES:
        return parse_object(body)
    return await asyncio.to_thread(parse_object, body)


def _too_large(config: ServerConfig) -> ApiError:
    return ApiError(413, f"The body is larger than {config.max_body_bytes} bytes.")
