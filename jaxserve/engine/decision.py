"""What passes between the scheduler and a runner: decisions there, results back. No JAX.

Both are columns with one element per lane (a request's part of a step), so that a step of hundreds
of requests is made and packed in a few array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxserve.engine.request import PromptRead, Request, TokenLogprobs


@dataclass(frozen=True)
class Decision:
    """What one step does. Nothing in it changes after it was made.

    Attributes:
        requests: [n], whose lanes; those whose row changed hands stand last.
        num_new_rows: how many those are: their sampling settings must be written.
        row: int32 [n], their rows of device state.
        start: int32 [n], positions of their first scheduled tokens.
        num_scheduled_tokens: int32 [n], how many tokens from there, at least one.
        num_prompt_tokens: int32 [n].
        rope_length: int32 [n], the lengths by which their keys are rotated, see ``rope.cos_sin``.
        num_preemptions: int32 [n], the requests' at that time, to tell who kept its pages since.
        output_index: int32 [n], index in the output of the token that the lane chooses.
        samples: bool [n], whether it chooses one: its last scheduled token is the sequence's last.
        ends: bool [n], whether that is the last token that the request may have.
        token_ids: int32 [num_tokens], lane after lane; -1 for the row's last sampled token, which
            the device keeps.
        table_updates: int32 [m, 3] of (row, column, page), cells to enter into the page table.
    """

    requests: Sequence[Request]
    num_new_rows: int
    row: np.ndarray
    start: np.ndarray
    num_scheduled_tokens: np.ndarray
    num_prompt_tokens: np.ndarray
    rope_length: np.ndarray
    num_preemptions: np.ndarray
    output_index: np.ndarray
    samples: np.ndarray
    ends: np.ndarray
    token_ids: np.ndarray
    table_updates: np.ndarray

    @property
    def num_lanes(self) -> int:
        """Requests in the step."""
        return len(self.requests)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return len(self.token_ids)


class StepResult(NamedTuple):
    """What a completed step chose, lane by lane.

    Attributes:
        token_ids: [n]; -1 says that the lane's logits were bad (NaN, or nothing left to choose).
            Without meaning where a lane samples nothing.
        logprobs: [n], None for who didn't ask; None instead if nobody did.
        prompt_reads: what was found out about prompts, for who asked.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None] | None = None
    prompt_reads: Sequence[tuple[Request, PromptRead]] = ()
