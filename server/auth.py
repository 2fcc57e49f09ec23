"""API keys: who may use which route."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.errors import unauthorized

OPEN_ROUTES = frozenset(
    ("/health", "/ping", "/ready", "/startup", "/metrics", "/docs", "/openapi.json")
)
"""Routes that need no key, by the pattern under which they are in the route table; the files of the
page at "/" come on top. Health and metrics are for machines that hold no keys, and tell nothing of
any single request; the page asks for the key itself."""


class Keys:
    """Compares a key with all known ones in a time that doesn't depend on any of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def auth_middleware(keys: Sequence[str], open_routes: Collection[str]) -> Middleware:
    """Lets in who shows a key, and everybody to the open routes.

    It decides by the route that aiohttp resolved, so no spelling of a path gets around it; what no
    route matches needs a key too.
    """
    known = Keys(keys)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is None or resource.canonical not in open_routes:
            _check(request, known)
        return await handler(request)

    return check


def _check(request: web.Request, known: Keys) -> None:
    values = request.headers.getall("Authorization", [])
    if not values:
        raise unauthorized('No API key was sent; send the header "Authorization: Bearer KEY".')
    scheme, _, key = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or key not in known:
        raise unauthorized("The API key is not valid here.")


def _digest(key: str) -> bytes:
    # Header bytes that are no UTF-8 come as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
