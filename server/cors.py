"""CORS: which pages of other origins may use the server from a browser."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.config import ServerConfig

MAX_AGE_S = 600
METHODS = ("GET", "POST", "OPTIONS")


def add_cors(app: web.Application, config: ServerConfig) -> None:
    """Has the application answer preflight requests and mark replies to allowed origins."""
    app.middlewares.append(_preflight_middleware(config))

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        _mark(request, response, config)

    app.on_response_prepare.append(mark)


def _preflight_middleware(config: ServerConfig) -> Middleware:
    """Answers preflight requests, which carry no key."""
    methods = METHODS if "*" in config.allowed_methods else config.allowed_methods

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        preflight = (
            request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        )
        if not preflight or origin is None or not _allowed(origin, config):
            return await handler(request)
        asked = request.headers.get("Access-Control-Request-Headers", "")
        every = "*" in config.allowed_headers
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": ", ".join(methods),
                "Access-Control-Allow-Headers": (
                    asked if every else ", ".join(config.allowed_headers)
                ),
                "Access-Control-Max-Age": str(MAX_AGE_S),
            },
        )

    return check


def _mark(request: web.Request, response: web.StreamResponse, config: ServerConfig) -> None:
    """Sets the headers by which a browser lets a page of another origin read a reply."""
    origin = request.headers.get("Origin")
    if origin is None or not _allowed(origin, config):
        return
    every = "*" in config.allowed_origins
    response.headers["Access-Control-Allow-Origin"] = "*" if every else origin
    response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
    if not every:
        response.headers["Vary"] = "Origin"
    if config.allow_credentials:
        response.headers["Access-Control-Allow-Credentials"] = "true"


def _allowed(origin: str, config: ServerConfig) -> bool:
    return "*" in config.allowed_origins or origin in config.allowed_origins
