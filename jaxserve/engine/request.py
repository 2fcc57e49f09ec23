"""Request: the host's state of one generation, and what the engine reports about it. No JAX."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from jaxserve.sampling.params import SamplingParams


class Status(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a request ended, in OpenAI's words where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, before temperature and penalties.

    Attributes:
        token_id, logprob, rank: of the chosen token; rank 1 is the likeliest.
        top: (token id, logprob) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """One generation.

    The sequence is the prompt plus the output. What the scheduler counts of it while it runs stands
    in ``running.Columns``.

    Attributes:
        request_id: unique among live requests.
        token_ids: prompt and known output.
        num_prompt_tokens: how many of them are the prompt.
        params: what the user asked for.
        max_tokens: most output tokens, with the context's end taken into account.
        stop_token_ids: ids that end it, the model's own end tokens included unless ignored.
        seed: key of its random numbers; with the output index it fixes every draw.
        cache_salt: prefixes are shared only between requests with equal salts.
        num_pending: of one that lost its row, the tokens that steps under way will still bring; it
            waits for them.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission.
        pages: its pages, in order of position.
        page_hashes: chained hashes of its full pages, as far as they were needed.
        row: its row of device state while it runs, else -1.
        num_preemptions: how often it lost its pages.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    cache_salt: bytes = b""
    num_prompt_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int | None = None
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    row: int = -1
    num_preemptions: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The output known so far."""
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(slots=True)
class RequestUpdate:
    """News of one request after a step: at most one token, and how it ended if it did."""

    request: Request
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
