"""A mixed load for some seconds; ten minutes of it: python -m tests.helpers.soak."""

from __future__ import annotations

import asyncio

from tests.helpers.mixed_load import BAD, Plan, Tally
from tests.helpers.soak import promises, soak
from tests.server.running import free_port, running

TIMES = ("p99 TTFT", "event loop lag", "front-end CPU")
"""Promises that only mean something on a machine with nothing else to do."""


def enough(tally: Tally) -> bool:
    """Whether everything that may happen to a request did."""
    counts = tally.counts
    all_kinds = counts["whole"] > 10 and counts["left"] > 0 and counts["refused"] > 0
    return all_kinds and len(tally.texts) > 5


def test_a_mixed_load_leaves_nothing_behind() -> None:
    plan = Plan(clients=16, seconds=4, warm_up_s=2, disconnects=0.15, bad=0.15)
    port = free_port()
    with running("--port", str(port)) as server:
        server.wait_ready()
        figures = asyncio.run(soak(plan, server.process.pid, port, enough))
        assert not any("Traceback" in line for line in server.err)
    rows = [row for row in promises(figures) if not row[0].startswith(TIMES)]
    assert len(rows) > 5 and all(kept for *_, kept in rows), figures
    assert len({bad.status for bad in BAD}) >= 4
