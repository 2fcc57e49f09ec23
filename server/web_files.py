"""The page at ``/``: the files of ``server/web``, with the headers that keep it to itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

WEB_FOLDER = Path(__file__).parent / "web"

CONTENT_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The page's scripts make no HTML from text; with this the browser holds them to it.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # The browser keeps the files and asks each time whether they changed: an upgrade of the server
    # never meets an old page.
    "Cache-Control": "no-cache",
}


def add_web(app: web.Application) -> tuple[str, ...]:
    """Adds ``/`` and ``/web/<file>`` to the application; the files are read now, once.

    Returns:
        The paths added. They hold nothing secret and need no API key: the page asks for the key.
    """
    paths = []
    for file in sorted(WEB_FOLDER.iterdir()):
        if file.suffix not in CONTENT_TYPES:
            continue
        path = "/" if file.name == "index.html" else f"/web/{file.name}"
        app.router.add_get(path, _handler(file.read_bytes(), CONTENT_TYPES[file.suffix]))
        paths.append(path)
    return tuple(paths)


def _handler(body: bytes, content_type: str) -> Handler:
    """Answers GET and HEAD with the body, or 304 if the client has it."""
    etag = hashlib.sha256(body).hexdigest()[:32]

    async def serve(request: web.Request) -> web.Response:
        known = {tag.value for tag in request.if_none_match or ()}
        if known & {etag, "*"}:
            response = web.Response(status=304, headers=HEADERS)
        else:
            response = web.Response(
                body=body, content_type=content_type, charset="utf-8", headers=HEADERS
            )
        response.etag = etag
        return response

    return serve
