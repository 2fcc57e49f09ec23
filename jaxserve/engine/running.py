"""The requests that run, and what the scheduler counts of them, as columns. No JAX."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from jaxserve.engine.request import Request, Status


class Columns(NamedTuple):
    """Numbers of requests that run, int32 [n] each.

    Attributes:
        row: their rows of device state.
        num_preemptions: how often they lost their pages before.
        num_prompt_tokens: tokens of the prompt.
        max_num_tokens: length at which they end, prompt and output together.
        num_given_tokens: tokens that the host knew at admission. Those behind were sampled in the
            row since, and the device has them.
        num_slots: tokens that their pages hold.
        num_tokens: prompt and output, tokens not yet known to the host included.
        num_computed_tokens: tokens whose keys and values are (or will be, by steps already
            dispatched) in their pages.
    """

    row: np.ndarray
    num_preemptions: np.ndarray
    num_prompt_tokens: np.ndarray
    max_num_tokens: np.ndarray
    num_given_tokens: np.ndarray
    num_slots: np.ndarray
    num_tokens: np.ndarray
    num_computed_tokens: np.ndarray

    def num_schedulable_tokens(self) -> np.ndarray:
        """Tokens that a step could compute now, int32 [n]; the last token of all never is."""
        return np.minimum(self.num_tokens, self.max_num_tokens - 1) - self.num_computed_tokens


class Running:
    """Requests that hold a row, oldest first, and the rows that are free.

    Attributes:
        requests: in order of arrival.
        columns: their numbers in the same order, as views that can be written to. They hold until
            the next ``add`` or ``remove``.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.requests: list[Request] = []
        self._free_rows = list(range(max_rows))
        self._table = np.zeros((len(Columns._fields), max_rows), np.int32)
        self.columns = self._view()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def num_free_rows(self) -> int:
        """How many more requests can run."""
        return len(self._free_rows)

    def add(self, request: Request, num_computed_tokens: int) -> None:
        """Gives a request without pages the lowest free row; it is the youngest now."""
        request.row = heapq.heappop(self._free_rows)
        request.status = Status.RUNNING
        self.requests.append(request)
        self.columns = columns = self._view()
        columns.row[-1] = request.row
        columns.num_preemptions[-1] = request.num_preemptions
        columns.num_prompt_tokens[-1] = request.num_prompt_tokens
        columns.max_num_tokens[-1] = request.num_prompt_tokens + request.max_tokens
        columns.num_given_tokens[-1] = columns.num_tokens[-1] = len(request.token_ids)
        columns.num_slots[-1] = 0
        columns.num_computed_tokens[-1] = num_computed_tokens

    def remove(self, request: Request) -> int:
        """Takes the row away; returns how many of its tokens the host doesn't know yet."""
        index = self.requests.index(request)
        num_pending = int(self.columns.num_tokens[index]) - len(request.token_ids)
        del self.requests[index]
        self._table[:, index:-1] = self._table[:, index + 1 :]
        self.columns = self._view()
        heapq.heappush(self._free_rows, request.row)
        request.row = -1
        return num_pending

    def select(self, indices: np.ndarray) -> Columns:
        """A copy of some requests' numbers."""
        return Columns(*self._table.take(indices, axis=1))

    def check_integrity(self) -> None:
        """Checks that no row is lost or owned twice.

        Raises:
            RuntimeError: one is.
        """
        rows = [request.row for request in self.requests]
        if sorted(rows + self._free_rows) != list(range(self.max_rows)):
            raise RuntimeError(f"rows are lost or owned twice: {rows} of {self.max_rows}")
        if self.columns.row.tolist() != rows:
            raise RuntimeError("the columns don't belong to the requests")

    def _view(self) -> Columns:
        return Columns(*self._table[:, : len(self.requests)])
