"""GET /openapi.json and GET /docs: the tables of fields, for programs and for people."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from jaxserve import __version__
from server.protocol import chat, completions, tokens
from server.protocol.fields import Fields, object_schema
from server.replies import json_response
from server.service import SERVICE

BODIES: dict[tuple[str, str], tuple[str, Fields]] = {
    ("POST", "/v1/completions"): ("CompletionRequest", completions.FIELDS),
    ("POST", "/v1/chat/completions"): ("ChatCompletionRequest", chat.FIELDS),
    ("POST", "/v1/embeddings"): ("EmbeddingRequest", tokens.EMBEDDING_FIELDS),
    ("POST", "/tokenize"): ("TokenizeRequest", tokens.TOKENIZE_FIELDS),
    ("POST", "/detokenize"): ("DetokenizeRequest", tokens.DETOKENIZE_FIELDS),
    ("POST", "/generate"): ("GenerateRequest", completions.GENERATE_FIELDS),
}
"""Method and path to the body's name and fields."""
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td{border-top:1px solid #8884;padding:.3rem .6rem;"
    "vertical-align:top}code{font-family:ui-monospace,monospace}:root{color-scheme:light dark}"
)


async def openapi(request: web.Request) -> web.Response:
    """The routes in OpenAPI 3.1."""
    service = request.app[SERVICE]
    routes = [
        (route.method, route.resource.canonical, (route.handler.__doc__ or "").strip())
        for route in request.app.router.routes()
        if route.resource is not None
    ]
    return json_response(document(routes, service.config.root_path))


async def docs(request: web.Request) -> web.Response:
    """The same as a page."""
    return web.Response(text=_page(), content_type="text/html", headers=PAGE_HEADERS)


def document(routes: Iterable[tuple[str, str, str]], root_path: str = "") -> dict[str, Any]:
    """The OpenAPI document of (method, path, description) of routes."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, doc in routes:
        if method in ("GET", "POST") and not path.startswith("/web/"):
            paths.setdefault(path, {})[method.lower()] = _operation(method, path, doc)
    schemas = {name: object_schema(fields) for name, fields in BODIES.values()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": __version__},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(method: str, path: str, doc: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": doc.split("\n\n")[0].replace("\n    ", " "),
        "responses": {
            "200": {"description": "It worked."},
            "4XX": {"description": "The request is at fault.", "content": error},
            "5XX": {"description": "The server is at fault.", "content": error},
        },
    }
    if "{model}" in path:
        where = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [where]
    if (method, path) in BODIES:
        name, _ = BODIES[method, path]
        schema = {"schema": {"$ref": f"#/components/schemas/{name}"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation


def _page() -> str:
    """A static page, made of the tables."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>jaxserve: the API</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>jaxserve {html.escape(__version__)}</h1>",
        "<p>The same for programs: <a href=openapi.json>openapi.json</a>. A null counts as absent; "
        "a field that stands nowhere here is refused.</p>",
    ]
    for (method, path), (_, fields) in BODIES.items():
        parts.append(f"<h2>{method} {html.escape(path)}</h2><table>")
        for name, field in fields.items():
            needed = " (required)" if field.required else ""
            doc = html.escape(field.doc + needed)
            parts.append(f"<tr><td><code>{html.escape(name)}</code><td>{doc}")
        parts.append("</table>")
    return "\n".join(parts)
