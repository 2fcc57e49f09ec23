"""How long tests wait for what has been promised within some seconds.

A promise about time is one about a machine that has the time for it. Tests share theirs with other
tests and with who knows what, so they wait ``PATIENCE`` times as long. On an idle machine,

    JAXSERVE_TEST_PATIENCE=1 pytest tests/server

holds the server to the promises themselves.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

PATIENCE = float(os.environ.get("JAXSERVE_TEST_PATIENCE", "10"))


def within(seconds: float) -> float:
    """The seconds that a test allows for what is promised in so many."""
    return seconds * PATIENCE


def timeout(seconds: float) -> asyncio.Timeout:
    """Like ``asyncio.timeout``, with patience."""
    return asyncio.timeout(within(seconds))


async def until(condition: Callable[[], object], seconds: float = 1.0) -> None:
    """Waits until something is so.

    Raises:
        TimeoutError: it wasn't in time, with patience.
    """
    async with timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def poll(condition: Callable[[], object], seconds: float = 1.0) -> None:
    """Like ``until``, without an event loop."""
    end = time.monotonic() + within(seconds)
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s, with patience")
        time.sleep(0.01)
