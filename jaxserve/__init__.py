"""jaxserve: LLM inference in JAX for GPU, TPU and CPU.

The public names, loaded when they are first used, so that ``import jaxserve`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams
    from jaxserve.config import EngineConfig
    from jaxserve.errors import (
        CheckpointError,
        ConfigError,
        EngineClosedError,
        InvalidRequestError,
        JaxserveError,
        RequestFailedError,
        UnsupportedModelError,
    )
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
    from jaxserve.sampling.params import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "jaxserve.llm",
    "SamplingParams": "jaxserve.sampling.params",
    "EngineConfig": "jaxserve.config",
    "RequestOutput": "jaxserve.outputs",
    "CompletionOutput": "jaxserve.outputs",
    "EmbeddingRequestOutput": "jaxserve.outputs",
    "BeamSearchParams": "jaxserve.beam_search",
    "BeamSearchOutput": "jaxserve.beam_search",
    "JaxserveError": "jaxserve.errors",
    "InvalidRequestError": "jaxserve.errors",
    "ConfigError": "jaxserve.errors",
    "CheckpointError": "jaxserve.errors",
    "UnsupportedModelError": "jaxserve.errors",
    "RequestFailedError": "jaxserve.errors",
    "EngineClosedError": "jaxserve.errors",
}

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "EngineClosedError",
    "EngineConfig",
    "InvalidRequestError",
    "JaxserveError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
