"""Engines in processes of their own, with a fake model, for tests of the server."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from jaxserve import EngineConfig
from server.engine_client import EngineClient
from server.engine_supervisor import LONGEST_SILENCE_S, EngineProcess
from tests.helpers.patience import until

FAKE = (sys.executable, "-m", "tests.helpers.fake_engine_process")


def fake_process(
    *,
    restart: bool = True,
    step_timeout_s: float = 60.0,
    silence_s: float = LONGEST_SILENCE_S,
    **options: Any,
) -> EngineProcess:
    """A process with a fake engine; see ``fake_engine_process`` for the options."""
    command = (*FAKE, json.dumps(options))
    return EngineProcess(
        EngineConfig(),
        command=command,
        restart=restart,
        step_timeout_s=step_timeout_s,
        back_off_s=0.5,
        silence_s=silence_s,
    )


@contextlib.asynccontextmanager
async def fake_client(
    *, max_queue: int = 1024, queue_timeout_s: float = 60.0, **options: Any
) -> AsyncIterator[EngineClient]:
    """A client of a process with a fake engine, ready."""
    process = fake_process(**options)
    client = EngineClient(process, max_queue=max_queue, queue_timeout_s=queue_timeout_s)
    await client.start()
    try:
        await until(lambda: client.state == "ready", 20)
        yield client
    finally:
        await client.close()
