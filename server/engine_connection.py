"""One front-end's connection, seen from the engine: an inbox shared with others, its own outbox."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator

from jaxserve import log
from server import wire
from server.wire import Event

FRAME_WEIGHT = 100_000
"""About how many numbers a frame with events holds, unless one event alone is longer."""
LOGPROBS_WEIGHT = 45
"""Numbers that a token brings with its log-probabilities, at most."""
MAX_REPLIES = 1024
"""Answers that a front-end may leave unread."""


class Connection:
    """Reads commands into the inbox and sends what is posted, each in a thread of its own.

    What a slow front-end hasn't taken yet grows no faster than its requests' outputs: events of one
    request are merged, and of heartbeats and the like only the newest is kept.

    Args:
        sock: connected to the front-end.
        number: unlike that of any other connection.
        inbox: gets (connection, command), at the end (connection, None).
    """

    def __init__(
        self,
        sock: socket.socket,
        number: int,
        inbox: queue.Queue[tuple[Connection, wire.Message | None]],
    ) -> None:
        self._sock = sock
        self._number = number
        self._inbox = inbox
        self._changed = threading.Condition()
        self._newest: dict[type, wire.Message] = {}
        self._replies: list[wire.Reply] = []
        self._events: dict[str, Event] = {}
        self._closed = False
        for target in (self._read, self._write):
            threading.Thread(target=target, name=f"jaxserve{target.__name__}", daemon=True).start()

    def key(self, request_id: str) -> str:
        """A front-end's request id, made unlike those of other front-ends."""
        return f"{self._number}/{request_id}"

    def post(self, message: wire.Reply | wire.Starting | wire.Ready | wire.Heartbeat) -> None:
        """Has a message sent; returns at once."""
        with self._changed:
            if isinstance(message, wire.Reply):
                self._replies.append(message)
            else:
                self._newest[type(message)] = message
            self._changed.notify()
        if len(self._replies) > MAX_REPLIES:
            log.logger.warning("a front-end reads no answers; its connection is closed.")
            self.close()

    def post_events(self, events: list[Event]) -> None:
        """Has news of requests sent; returns at once."""
        with self._changed:
            for event in events:
                before = self._events.get(event.request_id)
                self._events[event.request_id] = event if before is None else _merged(before, event)
            self._changed.notify()

    def close(self) -> None:
        """Ends both threads. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            with self._sock.makefile("rb") as file:
                while header := file.read(wire.HEADER.size):
                    payload = file.read(wire.payload_size(header))
                    message = wire.decode(payload)
                    if not isinstance(message, wire.FROM_FRONT_END):
                        raise wire.WireError(f"a front-end sent a {type(message).__name__}")
                    self._inbox.put((self, message))
        except wire.WireError as error:
            log.logger.warning("a front-end's connection is closed: %s", error)
        except OSError:
            pass  # it has gone
        finally:
            self.close()
            self._inbox.put((self, None))

    def _write(self) -> None:
        try:
            with self._sock:
                while messages := self._take():
                    for message in messages:
                        self._sock.sendall(wire.encode(message))
        except OSError:
            pass  # it has gone
        except wire.WireError as error:
            log.logger.warning("a front-end's connection is closed: %s", error)
        finally:
            self.close()

    def _take(self) -> list[wire.Message]:
        """What there is to send, waiting for something; nothing once the connection is closed."""
        with self._changed:
            while not (self._newest or self._replies or self._events or self._closed):
                self._changed.wait()
            if self._closed:
                return []
            newest, self._newest = self._newest, {}
            replies, self._replies = self._replies, []
            events, self._events = self._events, {}
        return [*newest.values(), *replies, *_frames(events)]


def _merged(first: Event, then: Event) -> Event:
    """Two events of a request as one; takes over the first's lists."""
    first.token_ids.extend(then.token_ids)
    if first.logprobs is not None:
        first.logprobs.extend(then.logprobs or ())
    return then._replace(
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        num_cached_tokens=first.num_cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
    )


def _frames(events: dict[str, Event]) -> Iterator[wire.Events]:
    """The events in groups of which each fits into a frame."""
    group, weight = wire.Events({}, []), 0
    for event in events.values():
        num_logprobs = len(event.logprobs or ()) + len(event.prompt_logprobs or ())
        size = 8 + len(event.token_ids) + LOGPROBS_WEIGHT * num_logprobs
        if weight and weight + size > FRAME_WEIGHT:
            yield group
            group, weight = wire.Events({}, []), 0
        if event[2:] == wire.NOTHING_ELSE:
            group.tokens[event.request_id] = event.token_ids
        else:
            group.events.append(event)
        weight += size
    if weight:
        yield group
