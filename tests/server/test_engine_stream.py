"""The events of one request: what is diverted and what is read are together all, in order."""

from __future__ import annotations

import asyncio
import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from server.engine_stream import EngineStream, TokenEvent


@given(steps=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_what_is_diverted_and_what_is_read_is_all_in_order(
    steps: list[tuple[bool, bool]],
) -> None:
    """Each step brings a token; whether the taker is free then, and whether the reader gets its
    turn afterwards, is drawn."""
    got: list[int] = []
    diverted = []

    async def main() -> None:
        stream, free = EngineStream("a", lambda: None), False

        def take(event: TokenEvent) -> bool:
            if free:
                got.extend(event.token_ids)
                diverted.extend(event.token_ids)
            return free

        async def read() -> None:
            async for event in stream:
                got.extend(event.token_ids)

        stream.divert(take)
        reader = asyncio.create_task(read())
        for number, (free, pause) in enumerate(steps):  # noqa: B007
            last = number == len(steps) - 1
            stream.put(TokenEvent([number], finish_reason="length" if last else None))
            if pause:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        await reader

    asyncio.run(main())
    assert got == list(range(len(steps)))
    assert len(steps) - 1 not in diverted, "the last event is the reader's"


def test_what_the_taker_raises_ends_the_request_for_its_reader_alone() -> None:
    aborted = []

    async def main() -> None:
        stream = EngineStream("a", lambda: aborted.append("a"))

        def take(event: TokenEvent) -> bool:
            raise ValueError("no such token")

        stream.divert(take)
        stream.put(TokenEvent([1]))
        try:
            await anext(stream)
        except ValueError as error:
            assert str(error) == "no such token"
        else:
            raise AssertionError("the reader isn't told")

    asyncio.run(main())
    assert aborted == ["a"]


def test_an_ended_stream_leaves_no_garbage() -> None:
    """A taker knows its stream. Collections take long, for they look at all requests."""

    async def main() -> weakref.ref[EngineStream]:
        stream = EngineStream("a", lambda: None)
        stream.divert(lambda event: stream is None)
        async with stream:
            stream.put(TokenEvent([1], finish_reason="length"))
        return weakref.ref(stream)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()
