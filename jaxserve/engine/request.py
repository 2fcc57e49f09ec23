"""Request: the host's state of one generation, and what the engine reports about it. No JAX."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

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

    The sequence is the prompt plus the output. Its last ``num_pending`` tokens were sampled on the
    device, but their ids are not known to the host yet: 1 when a step runs ahead, for a moment 2.

    Attributes:
        request_id: unique among live requests.
        token_ids: prompt and known output.
        num_prompt_tokens: how many of them are the prompt.
        params: what the user asked for.
        max_tokens: most output tokens, with the context's end taken into account.
        stop_token_ids: ids that end it, the model's own end tokens included unless ignored.
        seed: key of its random numbers; with the output index it fixes every draw.
        cache_salt: prefixes are shared only between requests with equal salts.
        num_computed_tokens: tokens whose keys and values are (or will be, by steps already
            dispatched) in its pages.
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
    num_computed_tokens: int = 0
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
    def num_tokens(self) -> int:
        """Prompt and output, tokens not yet known to the host included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, those not yet known to the host included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_schedulable_tokens(self) -> int:
        """Tokens that a step could compute now; 0 once the last token is sampled."""
        tokens = len(self.token_ids) + self.num_pending
        if tokens - self.num_prompt_tokens >= self.max_tokens:
            return 0
        return tokens - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The output known so far."""
        return self.token_ids[self.num_prompt_tokens :]


# The following are made once per request and step: tuples are the cheapest to make.


class ScheduledRequest(NamedTuple):
    """One request's part of a step.

    Attributes:
        request, row: whose part, and its row of device state.
        start: position of its first scheduled token.
        num_scheduled_tokens: how many tokens from there.
        samples: whether its last scheduled token's logits choose a new token.
        output_index: index in the output of the token so chosen.
        new_row: the row changed hands: its sampling settings must be written.
        new_pages: pages to enter into the row's page table, from column ``first_new_page`` on.
        num_preemptions: the request's at that time, to tell whether it kept its pages since.
    """

    request: Request
    row: int
    start: int
    num_scheduled_tokens: int
    samples: bool
    output_index: int
    new_row: bool
    first_new_page: int
    new_pages: tuple[int, ...]
    num_preemptions: int

    @property
    def token_ids(self) -> list[int]:
        """The scheduled tokens' ids; -1 for the one that only the device knows yet."""
        end = self.start + self.num_scheduled_tokens
        known = self.request.token_ids[self.start : end]
        return known + [-1] * (self.num_scheduled_tokens - len(known))


class Decision(NamedTuple):
    """What one step does."""

    scheduled: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(item.num_scheduled_tokens for item in self.scheduled)


class SampledToken(NamedTuple):
    """What the device chose for one scheduled request; token_id -1 says that its logits were bad
    (NaN, or nothing left to choose)."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class RequestUpdate(NamedTuple):
    """News of one request after a step: at most one token, and how it ended if it did."""

    request: Request
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
