"""What the engine says on a connection, and that it says nothing any more. No JAX.

The engine's process says something every HEARTBEAT_S, from a thread of its own: while a step runs,
while it compiles (XLA does that without Python's lock) and while it loads. Silence therefore means
that the process is stopped, that native code holds Python's lock, or that the machine has no time
for it. A step that hangs is no silence: the heartbeats say since when nothing has moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from server import wire

SILENCE_S = 4.0
"""After so long without a word, a front-end gives the engine's requests up: with a heartbeat per
second that is four of them missed, and within 5 s of the fault."""
TICK_S = 0.25


class SilenceError(ConnectionError):
    """Nothing has come for too long."""


class EngineLine(asyncio.Protocol):
    """A connection to the engine: hands on each message in the event loop's round that brings it. A
    stream and its reader would cost a second round for each frame, and find their caches cold.

    Args:
        take: gets each message.
    """

    def __init__(self, take: Callable[[wire.Message], None]) -> None:
        self._take = take
        self._frames = wire.Frames()
        self._num_heard = 0
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fault: wire.WireError | None = None

    @classmethod
    async def open(cls, path: Path, take: Callable[[wire.Message], None]) -> EngineLine:
        """A connection to the engine behind this socket. Raises OSError if there is none."""
        loop = asyncio.get_running_loop()
        _, line = await loop.create_unix_connection(lambda: cls(take), str(path))
        return line

    def send(self, frame: bytes) -> None:
        """Sends a frame, without waiting."""
        assert self._transport is not None, "it is open"
        self._transport.write(frame)

    async def hear(self, silence_s: Callable[[], float] = lambda: SILENCE_S) -> None:
        """Waits until the connection ends, and closes it.

        Args:
            silence_s: how long nothing may come.

        Raises:
            SilenceError: nothing came for so long.
            ConnectionError: the other end has closed it.
            WireError: what came is no message.
        """
        # Counted in ticks of this loop: when it was held up itself, messages may have come that it
        # had no time to read, so however long that took is one tick.
        assert self._transport is not None, "it is open"
        ticks, before = 0, self._num_heard
        try:
            while ticks * TICK_S < silence_s():
                await asyncio.wait((self._ended,), timeout=TICK_S)
                if self._ended.done():
                    raise self._fault or ConnectionResetError("the engine closed the connection")
                ticks = ticks + 1 if self._num_heard == before else 0
                before = self._num_heard
            self._transport.abort()  # to who doesn't listen either
            raise SilenceError(f"nothing was heard for {silence_s():g} s")
        finally:
            self._transport.close()

    # --- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.add(data):
                self._num_heard += 1
                self._take(wire.decode(payload))
        except wire.WireError as fault:
            self._fault = fault
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
