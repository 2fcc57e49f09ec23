"""How many tokens a step gets, so that few places of its program stay empty. No JAX.

Programs have fixed sizes, and a step costs by the places of its program, filled or not.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_HELD_STEPS = 4
"""Steps for which a queue may be held back, so that more prompts come together."""


class StepFiller:
    """Chooses the budget of one step after the other.

    Args:
        sizes: tokens that the programs for steps with prompts hold, ascending. With none, every
            step takes all that there is.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._num_held_steps = 0

    def budget(self, num_lanes: int, num_running: int, num_tokens: int, queue: bool) -> int:
        """How many tokens the next step should have.

        Args:
            num_lanes: running requests that have something to compute.
            num_running: their tokens.
            num_tokens: all that could be computed now, with those of requests that wait.
            queue: whether more requests wait than there are free rows.
        """
        too_few = num_running == num_lanes < num_tokens < min(self._sizes, default=0)
        if too_few and queue and num_lanes > 0 and self._num_held_steps < MAX_HELD_STEPS:
            # Only decode now: some steps later more rows are free, and one step takes the prompts
            # of all who get them. Who comes without a queue starts at once.
            self._num_held_steps += 1
            return num_lanes
        self._num_held_steps = 0
        return best_fill(self._sizes, num_lanes, num_tokens)


def best_fill(sizes: Sequence[int], num_lanes: int, num_tokens: int) -> int:
    """How many of the tokens that could be computed now should be.

    Either all of them, or as many as fill the largest size below, and the others in the next step:
    whichever leaves fewer places empty in both.

    Args:
        sizes: see StepFiller.
        num_lanes: requests that have at least one token in this step and one in the next.
        num_tokens: those that could be computed now.
    """
    full = max((size for size in sizes if num_lanes < size < num_tokens), default=num_tokens)
    next_step = num_lanes + num_tokens - full
    return full if num_empty(sizes, next_step) < num_empty(sizes, num_tokens) else num_tokens


def num_empty(sizes: Sequence[int], num_tokens: int) -> int:
    """Empty places of the smallest step that holds so many tokens; 0 if none does."""
    return next((size - num_tokens for size in sizes if size >= num_tokens), 0)
