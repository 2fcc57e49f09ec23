"""What a front-end knows of the engine, and why it may turn a request down. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jaxserve.engine.admission import Limits
from jaxserve.errors import JaxserveError

State = Literal["starting", "ready", "draining", "dead", "closed"]


class OverloadedError(JaxserveError):
    """The queue is full.

    Attributes:
        retry_after_s: when there may be room again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(OverloadedError):
    """The request waited in the queue for too long."""


class EngineDeadError(JaxserveError):
    """The engine can't take requests now: it starts, has died, or is being shut down."""


@dataclass(frozen=True)
class EngineInfo:
    """What front-ends need to know of the engine.

    Attributes:
        max_model_len: longest sequence, prompt and output together.
        vocab_size: width of the logits.
        eos_token_ids: the model's own end tokens.
        max_num_seqs: most requests that run at once.
        model: its name, directory or hub id.
        version: of jaxserve.
        default_sampling_params: of the model's generation_config.json.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
    model: str
    version: str
    default_sampling_params: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def limits(self) -> Limits:
        """What its prompts and parameters may be."""
        return Limits(self.max_model_len, self.vocab_size)


@dataclass(frozen=True)
class Startup:
    """How far the start is: a stage's name ("weights", "compiling", ..., at last "ready"), how much
    of it is done, and how long the rest of it may take, if that is known."""

    stage: str
    done: int
    total: int
    eta_s: float | None
