"""The aiohttp application: the route table, what every request passes through, the life cycle."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from jaxserve.errors import ConfigError
from jaxserve.tokenizer import Tokenizer
from server import loop_lag
from server.auth import OPEN_ROUTES, auth_middleware
from server.config import ServerConfig
from server.cors import add_cors
from server.engine_client import EngineClient
from server.errors import api_error
from server.metrics import Metrics
from server.replies import new_id
from server.routes.chat import chat_completions
from server.routes.completions import completions
from server.routes.embeddings import embeddings
from server.routes.generate import generate
from server.routes.health import health, load, metrics, ready, startup, version
from server.routes.models import get_model, list_models
from server.routes.openapi import docs, openapi
from server.routes.tokens import detokenize, tokenize
from server.service import SERVICE, Service
from server.texts import Texts
from server.web_files import add_web

access_logger = logging.getLogger("jaxserve.access")
http_logger = logging.getLogger("jaxserve.http")
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
CHOSEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a client may choose as X-Request-Id; it ends in logs and replies, never in a key."""
CLIENT_LEFT = 499
"""The status that nginx gives a request whose client left; it is only counted and logged."""
LINGERING_S = 2.0
"""How long an unread body is drained after an early reply, so that the client reads the reply."""
ROUTES = (
    web.get("/health", health),
    web.get("/ping", health),
    web.get("/ready", ready),
    web.get("/startup", startup),
    web.get("/version", version),
    web.get("/load", load),
    web.get("/metrics", metrics),
    web.get("/v1/models", list_models),
    web.get("/v1/models/{model:.+}", get_model),
    web.post("/v1/completions", completions),
    web.post("/v1/chat/completions", chat_completions),
    web.post("/v1/embeddings", embeddings),
    web.post("/tokenize", tokenize),
    web.post("/detokenize", detokenize),
    web.post("/generate", generate),
)
DOCS = (web.get("/openapi.json", openapi), web.get("/docs", docs))


def create_app(
    config: ServerConfig,
    engine: EngineClient,
    tokenizer: Tokenizer | None,
    served_names: Sequence[str],
) -> web.Application:
    """The application of one front-end. Starting and closing the engine is the caller's business.

    Run it with ``create_runner``, which has the settings that it relies on.

    Args:
        served_names: of the model; the first stands in replies.

    Raises:
        ConfigError: a middleware can't be imported.
    """
    app = web.Application(client_max_size=config.max_body_bytes)
    app.add_routes(ROUTES)
    if config.enable_docs:
        app.add_routes(DOCS)
    open_routes = {*OPEN_ROUTES, *add_web(app)}
    names = tuple(served_names)
    app[SERVICE] = service = Service(
        config=config,
        engine=engine,
        texts=Texts(tokenizer, config.max_queue),
        names=names,
        metrics=Metrics(names[0]),
        started=int(time.time()),
    )
    service.metrics.load.set_function(lambda: service.under_way)
    app.on_response_prepare.append(_show_request_id)
    app.middlewares.append(_outermost)
    if config.allowed_origins:
        add_cors(app, config)
    app.middlewares.append(_errors)
    if config.api_keys:
        app.middlewares.append(auth_middleware(config.api_keys, open_routes))
    app.middlewares.extend(_imported(path) for path in config.middleware)
    app.cleanup_ctx.append(_background)
    return app


def create_runner(app: web.Application) -> web.AppRunner:
    """A runner with the settings that the application relies on: handlers end when their client
    leaves, idle connections and half-sent heads are closed, and there are no access logs but ours.
    """
    config = app[SERVICE].config
    return web.AppRunner(
        app,
        handler_cancellation=True,
        keepalive_timeout=config.keep_alive_s,
        lingering_time=LINGERING_S,
        shutdown_timeout=0,  # the engine's client waits for running requests before
        access_log=None,
        logger=http_logger,
    )


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether aiohttp logs a fault of the server: what is no HTTP gets its 400, and no traceback in
    the log, which any client could fill with them."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


http_logger.addFilter(_is_ours)


async def _background(app: web.Application) -> AsyncIterator[None]:
    """What runs beside the requests."""
    service = app[SERVICE]
    lag = asyncio.create_task(loop_lag.watch(service.metrics.loop_lag.observe))
    yield
    lag.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await lag
    service.texts.close()


@web.middleware
async def _outermost(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives each request an id, counts its reply and logs it.

    The log holds the route's pattern, not the path, and nothing of the query or of headers.
    """
    given = request.headers.get("X-Request-Id", "")
    request_id = given if CHOSEN_ID.fullmatch(given) else new_id()
    request[REQUEST_ID] = request_id
    began, status = time.monotonic(), CLIENT_LEFT
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        resource = request.match_info.route.resource
        route = "unmatched" if resource is None else resource.canonical
        service = request.app[SERVICE]
        service.metrics.replied(route, request.method, status)
        if service.config.access_log:
            seconds = time.monotonic() - began
            access_logger.info(
                "%s %s %s %d %.3f s", request_id, request.method[:16], route, status, seconds
            )


async def _show_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request[REQUEST_ID]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure becomes an OpenAI error object."""
    try:
        return await handler(request)
    except Exception as error:
        if request.transport is None or request.transport.is_closing():
            return web.Response(status=CLIENT_LEFT)  # there is nobody to tell
        response = api_error(error).response()
        if request.can_read_body and not request.content.is_eof():
            response.force_close()  # the rest of its body would be taken for the next request
        return response


def _imported(path: str) -> Middleware:
    """The middleware "module.function" or "module:function"."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"middleware {path!r} can't be imported: {error}.") from error
    return found
