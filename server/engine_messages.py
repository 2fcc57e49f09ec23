"""What the engine says on a connection, and that it says nothing any more. No JAX.

The engine's process says something every HEARTBEAT_S, from a thread of its own: while a step runs,
while it compiles (XLA does that without Python's lock) and while it loads. Silence therefore means
that the process is stopped, that native code holds Python's lock, or that the machine has no time
for it. A step that hangs is no silence: the heartbeats say since when nothing has moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server import wire

SILENCE_S = 4.0
"""After so long without a word, a front-end gives the engine's requests up: with a heartbeat per
second that is four of them missed, and within 5 s of the fault."""
TICK_S = 0.25


class SilenceError(ConnectionError):
    """Nothing has come for too long."""


async def hear(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    take: Callable[[wire.Message], None],
    silence_s: Callable[[], float] = lambda: SILENCE_S,
) -> None:
    """Hands on what the engine says until the connection ends, which it closes then.

    Args:
        take: gets each message.
        silence_s: how long there may be none.

    Raises:
        SilenceError: there was none for so long.
        OSError, asyncio.IncompleteReadError: the connection has ended.
        WireError: what came is no message.
    """
    num_heard, is_silent = 0, False

    async def watch() -> None:
        # Counted in ticks of this loop: when it was held up itself, messages may have come that it
        # had no time to read, so however long that took is one tick.
        nonlocal is_silent
        ticks, before = 0, num_heard
        while ticks * TICK_S < silence_s():
            await asyncio.sleep(TICK_S)
            ticks = ticks + 1 if num_heard == before else 0
            before = num_heard
        is_silent = True
        writer.transport.abort()

    watcher = asyncio.create_task(watch())
    try:
        while True:
            header = await reader.readexactly(wire.HEADER.size)
            payload = await reader.readexactly(wire.payload_size(header))
            num_heard += 1
            take(wire.decode(payload))
    except (OSError, asyncio.IncompleteReadError) as error:
        if is_silent:
            raise SilenceError(f"nothing was heard for {silence_s():g} s") from error
        raise
    finally:
        watcher.cancel()
        writer.close()
