"""The engine's process without a model: ``python -m tests.helpers.fake_engine_process OPTIONS``.

OPTIONS is JSON: "engine" holds arguments of fake_engine, "faults" maps steps to what goes wrong in
them, "pace" a fault of every other step, and "start" is what happens at the start: "fails" or
"is refused".
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jaxserve.engine.core import Engine
from jaxserve.errors import ConfigError
from server.engine_loop import EngineServer
from server.engine_main import run
from tests.helpers.fake_runner import fake_engine
from tests.helpers.faulty_runner import inject


def start(settings: dict[str, Any], server: EngineServer) -> tuple[Engine, dict[str, Any]]:
    """A fake engine, with the faults that were asked for."""
    options = json.loads(sys.argv[1])
    server.starting("weights", 1, 2)
    if options.get("start") == "is refused":
        raise ConfigError("no such model")
    if options.get("start") == "fails":
        raise RuntimeError("the device does not answer")
    engine, runner = fake_engine(**{"max_failures": 3, **options.get("engine", {})})
    faults = {int(step): fault for step, fault in options.get("faults", {}).items()}
    pace = options.get("pace")
    inject(engine, lambda step: faults.get(step, pace))
    return engine, {
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.vocab_size,
        "eos_token_ids": list(engine.eos_token_ids),
        "max_num_seqs": runner.max_rows,
        "model": "fake",
        "version": "0",
    }


if __name__ == "__main__":
    run(start)
