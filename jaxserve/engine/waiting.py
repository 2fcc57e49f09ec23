"""The requests that wait for a row, in the order in which they will get one. No JAX."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator

from jaxserve.engine.request import Request


class Waiting:
    """A queue for each priority, the lowest number first; within one, first come, first served."""

    def __init__(self) -> None:
        self._queues: dict[int, OrderedDict[Request, None]] = {}
        self._priorities: list[int] = []

    def add(self, request: Request) -> None:
        """Puts a request behind all others of its priority."""
        self._queue(request.priority)[request] = None

    def put_back(self, request: Request) -> None:
        """Puts a request before all others of its priority."""
        queue = self._queue(request.priority)
        queue[request] = None
        queue.move_to_end(request, last=False)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it stands."""
        priority = request.priority
        queue = self._queues[priority]
        del queue[request]
        if not queue:
            del self._queues[priority]
            self._priorities.remove(priority)

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._queues[priority]

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def _queue(self, priority: int) -> OrderedDict[Request, None]:
        if priority not in self._queues:
            self._queues[priority] = OrderedDict()
            bisect.insort(self._priorities, priority)
        return self._queues[priority]
