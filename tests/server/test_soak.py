"""A mixed load for some seconds; ten minutes of it: python -m tests.helpers.soak."""

from __future__ import annotations

import asyncio

from tests.helpers.mixed_load import BAD, Plan
from tests.helpers.soak import promises, soak
from tests.server.running import free_port, running

TIMES = ("TTFT", "event loop lag", "CPU per token")
"""Promises that only mean something on a machine with nothing else to do."""


def test_a_mixed_load_leaves_nothing_behind() -> None:
    plan = Plan(clients=16, seconds=4, warm_up_s=2, disconnects=0.15, bad=0.15)
    port = free_port()
    with running("--port", str(port)) as server:
        server.wait_ready()
        figures = asyncio.run(soak(plan, server.process.pid, port))
        assert not any("Traceback" in line for line in server.err)
    broken = [
        row for row in promises(figures) if not row[3] and not any(word in row[0] for word in TIMES)
    ]
    assert not broken, figures
    requests = figures["requests"]
    assert requests["whole"] > 10 and requests["left"] > 0 and requests["refused"] > 0
    assert figures["texts"] > 5
    assert len({bad.status for bad in BAD}) >= 4
