"""The frame of the engine's process: settings in, exit code out, and no orphan. No JAX."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from jaxserve import log
from jaxserve.engine.core import Engine
from jaxserve.errors import JaxserveError
from server.engine_loop import EngineServer
from server.wire import EXIT_CANNOT_START, EXIT_FAILED, EXIT_ORPHAN

Start = Callable[[dict[str, Any], EngineServer], tuple[Engine, dict[str, Any]]]
"""Makes an engine ready from the settings; returns it and EngineInfo's fields."""


def run(start: Start) -> NoReturn:
    """Serves an engine with the settings on standard input until the process is ended.

    Nothing is tidied up at the end, whether it comes by a signal or by an error: memory and device
    go back to the system at once, while the interpreter would wait for threads that compile.
    """
    settings = json.loads(sys.stdin.buffer.readline())
    log.set_up()
    threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
    code = EXIT_CANNOT_START
    try:
        server = EngineServer(Path(settings["socket_path"]), settings["step_timeout_s"])
        engine, info = start(settings, server)
        code = EXIT_FAILED
        server.serve(engine, info)
    except JaxserveError as error:
        log.logger.error("the engine can't start: %s", " ".join(str(error).split()))
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _end_with(parent: BinaryIO) -> NoReturn:
    """Ends this process when the parent's end of the pipe is closed."""
    while parent.read(4096):
        pass
    os._exit(EXIT_ORPHAN)
