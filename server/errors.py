"""Every failure as OpenAI's error object: one table from exceptions to HTTP replies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from jaxserve.errors import InvalidRequestError, JaxserveError, RequestFailedError
from jaxserve.log import logger
from server.engine_info import EngineDeadError, OverloadedError, QueueTimeoutError

INVALID, SERVER, BUSY = "invalid_request_error", "server_error", "overloaded_error"
RETRY_AFTER_S = 5
"""For failures that know no better."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_HTTP_MESSAGES = {
    404: "There is nothing at this path.",
    405: "This path does not know this method; see the Allow header.",
    413: "The request body is too large.",
}


class ApiError(JaxserveError):
    """A failure with its HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        message = _ADDRESS.sub("", str(self))
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> web.Response:
        """The reply."""
        return web.Response(
            body=orjson.dumps(self.body()),
            status=self.status,
            headers=self.headers,
            content_type="application/json",
        )


def context_length_exceeded(message: str, param: str) -> ApiError:
    """The prompt, or the prompt with max_tokens, doesn't fit into the context."""
    return ApiError(400, message, param=param, code="context_length_exceeded")


def unauthorized(message: str) -> ApiError:
    """No key, or one that opens nothing."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)


def model_not_found(name: str) -> ApiError:
    """A name that no model here bears."""
    shown = repr(name if len(name) <= 80 else name[:77] + "...")
    message = f"The model {shown} does not exist; /v1/models lists those that do."
    return ApiError(404, message, param="model", code="model_not_found")


def unavailable(message: str, code: str, retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    """The server can't do it now, but may later."""
    return ApiError(503, message, kind=BUSY, code=code, headers=_retry_after(retry_after_s))


def api_error(error: BaseException) -> ApiError:
    """What a client is told of a failure. What nobody foresaw is logged here and told as 500."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param)
        case QueueTimeoutError():
            return unavailable(str(error), "queue_timeout", error.retry_after_s)
        case OverloadedError():
            headers = _retry_after(error.retry_after_s)
            return ApiError(429, str(error), kind=BUSY, code="overloaded", headers=headers)
        case EngineDeadError():
            return unavailable(str(error), "engine_dead")
        case RequestFailedError():
            return ApiError(500, str(error), kind=SERVER, code="generation_failed")
        case web.HTTPException():
            return _http_error(error)
    logger.error("a request failed unexpectedly", exc_info=error)
    message = "The server failed unexpectedly; its log says more."
    return ApiError(500, message, kind=SERVER, code="internal_error")


def _http_error(error: web.HTTPException) -> ApiError:
    """aiohttp's own errors; the Allow header of a 405 stays."""
    message = _HTTP_MESSAGES.get(error.status, f"{error.reason}.")
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return ApiError(error.status, message, headers=headers)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
