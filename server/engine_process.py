"""The engine in a process of its own: ``python -m server.engine_process``, started by its parent.

Standard input holds one line of JSON, the settings, and then stays open: when it ends, the parent
has gone and so does this process. A composition root, the only one of the server's that loads JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from converters import open_checkpoint
from jaxserve import __version__, build
from jaxserve.config import EngineConfig
from jaxserve.engine.core import Engine
from jaxserve.engine.timeline import Timeline
from jaxserve.sampling.params import SamplingParams
from server.engine_loop import EngineServer
from server.engine_main import run


def start_engine(settings: dict[str, Any], server: EngineServer) -> tuple[Engine, dict[str, Any]]:
    """Builds the engine of the settings and makes it ready; returns it and EngineInfo's fields.

    Raises:
        JaxserveError: the settings, the model and the machine don't go together.
    """
    config = EngineConfig(**settings["engine"])
    timeline = Timeline(on_begin=server.starting)
    server.starting("checkpoint")
    checkpoint = open_checkpoint(build.find_model(config), config.load_format)
    with build.rare_garbage_collection():
        built = build.build(config, checkpoint, timeline)
        wait_for_all = settings["warmup"] == "full"
        build.start_compiling(built, wait_for_all)
        with timeline.stage("weights"):
            build.load_weights(built, False, lambda *done: server.starting("weights", *done))
        if not built.config.enforce_eager:
            with timeline.stage("compiling"):
                build.warm_up(
                    built,
                    wait_for_all,
                    False,
                    lambda *done: server.starting("compiling", *done),
                )
        with timeline.stage("allocating"):
            build.allocate(built)
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    return built.engine, {
        "max_model_len": built.config.max_model_len,
        "vocab_size": built.model.vocab_size,
        "eos_token_ids": list(checkpoint.eos_token_ids),
        "max_num_seqs": built.config.max_num_seqs,
        "model": config.model or "jaxserve-demo",
        "version": __version__,
        "default_sampling_params": {
            name: value for name, value in checkpoint.generation.items() if name in fields
        },
    }


if __name__ == "__main__":
    run(start_engine)
