"""Measures how late the event loop wakes up: what any other coroutine waits on top of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.1


async def watch(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Sleeps again and again and reports by how many seconds each sleep was too long."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))
