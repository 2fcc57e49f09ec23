"""Request: the host's state of one generation, and what the engine reports about it. No JAX."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.sampling.params import SamplingParams

Pooling = Literal["last", "mean"]
"""Of which of the prompt's hidden states an embedding is made."""


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


@dataclass(frozen=True)
class PromptRead:
    """What a step found out about a piece of a prompt.

    Attributes:
        start: its first position.
        logprobs: of the tokens that follow each of its positions, if asked for.
        pooled: float32 [width], the sum of its hidden states, if asked for.
    """

    start: int
    logprobs: Sequence[TokenLogprobs] = ()
    pooled: Any = None


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
        priority: lower ones get a row first and lose it last.
        pooling: "last" or "mean" if it wants an embedding of the prompt instead of tokens.
        num_pending: of one that lost its row, the tokens that steps under way will still bring; it
            waits for them.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission.
        pages: its pages, per page table in order of position, see PageTables; empty while it waits.
        page_hashes: chained hashes of its full columns of pages, as far as they were needed.
        hash_root: what the first of them is chained to.
        row: its row of device state while it runs, else -1.
        num_preemptions: how often it lost its pages.
        prompt_logprobs: of the prompt's tokens but the first, as far as they are known.
        pooled: float32 [width], sum of the hidden states that its embedding is made of.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    cache_salt: bytes = b""
    priority: int = 0
    pooling: Pooling | None = None
    num_prompt_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int | None = None
    pages: list[list[int]] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    hash_root: bytes = b""
    row: int = -1
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: Any = None
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The output known so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def reads_prompt(self) -> bool:
        """Whether it still wants something of the hidden states of its prompt."""
        if self.pooling is not None:
            return True
        wanted = self.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether that takes all prompt tokens, so that none may come from the prefix cache."""
        return self.reads_prompt and self.pooling != "last"

    @property
    def embedding(self) -> Any:
        """The pooled hidden states, scaled to length 1: float32 [width]."""
        return self.pooled / max(float(self.pooled @ self.pooled) ** 0.5, 1e-12)

    def take(self, read: PromptRead) -> None:
        """Enters what a step found out about the prompt. The steps of a prompt that is computed
        anew come after those under way before, and bring the same log-probabilities again."""
        self.prompt_logprobs += read.logprobs[len(self.prompt_logprobs) - read.start :]
        if read.pooled is not None:
            anew = self.pooled is None or read.start == 0 or self.pooling == "last"
            self.pooled = read.pooled if anew else self.pooled + read.pooled


@dataclass(slots=True)
class RequestUpdate:
    """News of one request after a step: at most one token, and how it ended if it did.

    Attributes:
        request: whose.
        token_id: its next token.
        logprobs: of that token, if asked for.
        finish_reason: why it ended, if it did.
        prompt_logprobs: of the prompt's tokens but the first, if asked for; with the first token.
        embedding: float32 [width], if asked for.
    """

    request: Request
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: Any = None
