"""GET /health, /ping, /ready, /startup, /version, /load and /metrics: for machines that watch."""

from __future__ import annotations

import asyncio
import dataclasses

from aiohttp import web

from jaxserve import __version__
from jaxserve.errors import JaxserveError
from server.errors import unavailable
from server.metrics import CONTENT_TYPE
from server.replies import json_response
from server.service import SERVICE

STATS_TIMEOUT_S = 2.0


async def health(request: web.Request) -> web.Response:
    """200 if the engine was heard of lately and gets on, or compiles what it needs to; else 503.
    Never waits for anything."""
    service = request.app[SERVICE]
    if not service.alive:
        raise unavailable(f"The engine is {service.engine.state}.", "unhealthy")
    engine = service.engine
    return json_response({"status": "ok", "engine": engine.state, "compiling": engine.compiling})


async def ready(request: web.Request) -> web.Response:
    """200 if requests are taken: not while the model loads, nor while the server shuts down."""
    service = request.app[SERVICE]
    service.info()
    if not service.alive:
        raise unavailable("The engine has not been heard of lately.", "unhealthy")
    return json_response({"status": "ready"})


async def startup(request: web.Request) -> web.Response:
    """How far the start is; always 200."""
    return json_response(dataclasses.asdict(request.app[SERVICE].engine.startup))


async def version(request: web.Request) -> web.Response:
    """The version of jaxserve."""
    return json_response({"version": __version__})


async def load(request: web.Request) -> web.Response:
    """How many generating requests this front-end has under way."""
    return json_response({"server_load": request.app[SERVICE].under_way})


async def metrics(request: web.Request) -> web.Response:
    """Everything countable, for Prometheus."""
    service = request.app[SERVICE]
    try:
        async with asyncio.timeout(STATS_TIMEOUT_S):
            stats = await service.engine.stats()
    except (TimeoutError, JaxserveError):
        stats = None
    body = service.metrics.render(stats)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
