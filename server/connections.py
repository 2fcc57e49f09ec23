"""Takes connections while there are file descriptors for them, and refuses the others politely."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import sys
from collections.abc import Callable

import orjson

from jaxserve.log import logger
from server.errors import RETRY_AFTER_S, unavailable

BACKLOG = 4096
"""Connections that may wait to be accepted; the system may allow fewer."""
ACCEPTED_AT_ONCE = 16
"""In one round of the event loop: more would make all others wait. About four rounds pass until a
refused one is closed."""
RESERVE = 256
"""Descriptors that connections leave to everything else, and to refusals."""
REFUSALS = 64
"""How many of these may be refusals that wait for their client to read."""
REFUSAL_S = 1.0
WARN_EVERY_S = 60.0


async def accept(
    make_handler: Callable[[], asyncio.Protocol],
    sock: socket.socket,
    tls: ssl.SSLContext | None,
    most: int | None = None,
) -> asyncio.Server:
    """Accepts connections from a socket that listens; the caller closes the result.

    Without a limit, accept() fails with EMFILE at some time: asyncio then logs once for each
    connection of the backlog and stops accepting for a second, again and again, and the process
    can't open its own files either.

    Args:
        make_handler: makes the protocol of a connection.
        tls: for HTTPS.
        most: descriptors in use from which on connections are refused; by default as many as the
            system allows, without a reserve.
    """
    gate = _Gate(make_handler, most_descriptors() if most is None else most)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Newcomer(gate), sock=sock, ssl=tls, backlog=ACCEPTED_AT_ONCE
    )
    sock.listen(BACKLOG)  # asyncio has one number for this and for what it accepts at once
    return server


def most_descriptors() -> int:
    """Descriptors that may be in use when one more connection is taken."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(soft - RESERVE, soft // 2)


class _Gate:
    """Who comes in."""

    def __init__(self, make_handler: Callable[[], asyncio.Protocol], most: int) -> None:
        self.make_handler = make_handler
        self.most = most
        self._warned_at = -WARN_EVERY_S

    def warn(self, now: float) -> None:
        """Tells the operator, but not for each connection."""
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            logger.warning(
                "connections are refused: about %d are open, and this process may not have many "
                "more files; raise the limit (ulimit -n) or --api-server-count.",
                self.most,
            )


class _Newcomer(asyncio.Protocol):
    """A new connection: hands it to a handler, or refuses it.

    A new descriptor has the lowest free number, so its number tells how many are in use.
    """

    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        number = transport.get_extra_info("socket").fileno()
        if number < self._gate.most:
            handler = self._gate.make_handler()
            transport.set_protocol(handler)
            handler.connection_made(transport)
            return
        loop = asyncio.get_running_loop()
        self._gate.warn(loop.time())
        if number < self._gate.most + REFUSALS:
            self._transport = transport
            loop.call_later(REFUSAL_S, transport.abort)
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Only now that the request is here: closing a socket with unread bytes resets it."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_refusal())
            self._transport.close()


def _refusal() -> bytes:
    error = unavailable("Too many connections are open; try again later.", "too_many_connections")
    body = orjson.dumps(error.body())
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {RETRY_AFTER_S}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
