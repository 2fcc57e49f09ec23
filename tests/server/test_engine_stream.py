"""The events of one request: what is diverted and what is read are together all, in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine_stream import EngineStream, TokenEvent


@pytest.mark.parametrize("only_tokens", [False, True])
@given(steps=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_what_is_diverted_and_what_is_read_is_all_in_order(
    steps: list[tuple[bool, bool]], only_tokens: bool
) -> None:
    """Each step brings a token; whether the taker is free then, and whether the reader gets its
    turn afterwards, is drawn."""
    got: list[int] = []
    diverted = []

    async def main() -> None:
        stream, free = EngineStream("a", lambda: None), False

        def take(token_ids: list[int]) -> bool:
            if free:
                got.extend(token_ids)
                diverted.extend(token_ids)
            return free

        async def read() -> None:
            async for event in stream:
                got.extend(event.token_ids)

        if only_tokens:
            stream.divert_tokens(take)
        else:
            stream.divert(lambda event: take(event.token_ids))
        reader = asyncio.create_task(read())
        for number, (free, pause) in enumerate(steps):  # noqa: B007
            if number == len(steps) - 1:
                stream.put(TokenEvent([number], finish_reason="length"))
            else:
                stream.put_tokens([number])
            if pause:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        await reader

    asyncio.run(main())
    assert got == list(range(len(steps)))
    assert len(steps) - 1 not in diverted, "the last event is the reader's"


@pytest.mark.parametrize("tells_more", [False, True])
@pytest.mark.parametrize("diverted", [False, True])
@given(
    interval=st.integers(1, 6),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    last=st.integers(0, 3),
    fails=st.booleans(),
)
def test_between_the_first_event_and_the_last_each_has_as_many_tokens_as_are_news(
    diverted: bool, tells_more: bool, interval: int, counts: list[int], last: int, fails: bool
) -> None:
    """The first event is there at once, and together they are all, in order, whether the request
    ends or fails."""
    got: list[list[int]] = []

    async def main() -> None:
        stream, numbers = EngineStream("a", lambda: None, interval), iter(range(1000))

        def tokens(count: int) -> list[int]:
            return [next(numbers) for _ in range(count)]

        def take(token_ids: list[int]) -> bool:
            got.append(token_ids)
            return True

        async def read() -> None:
            with contextlib.suppress(ConnectionError):
                async for event in stream:
                    got.append(event.token_ids)

        if diverted:
            stream.divert(lambda event: take(event.token_ids))
            stream.divert_tokens(take)
        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        for place, count in enumerate(counts):
            if place == 0:
                stream.put(TokenEvent(tokens(count), num_cached_tokens=0))
            elif tells_more:
                stream.put(TokenEvent(tokens(count), logprobs=[]))
            else:
                stream.put_tokens(tokens(count))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert got[0] == list(range(counts[0])), "what comes first is told at once"
        if fails:
            stream.fail(ConnectionError())
        else:
            stream.put(TokenEvent(tokens(last), finish_reason="length"))
        await reader

    asyncio.run(main())
    total = sum(counts) + (0 if fails else last)
    assert [token for some in got for token in some] == list(range(total))
    assert all(interval <= len(some) < interval + 4 for some in got[1:-1])


@pytest.mark.parametrize("divert", [EngineStream.divert, EngineStream.divert_tokens])
def test_what_the_taker_raises_ends_the_request_for_its_reader_alone(
    divert: Callable[..., None],
) -> None:
    aborted = []

    async def main() -> None:
        stream = EngineStream("a", lambda: aborted.append("a"))

        def take(news: object) -> bool:
            raise ValueError("no such token")

        divert(stream, take)
        stream.put_tokens([1])
        try:
            await anext(stream)
        except ValueError as error:
            assert str(error) == "no such token"
        else:
            raise AssertionError("the reader isn't told")

    asyncio.run(main())
    assert aborted == ["a"]


@pytest.mark.parametrize("divert", [EngineStream.divert, EngineStream.divert_tokens])
def test_an_ended_stream_leaves_no_garbage(divert: Callable[..., None]) -> None:
    """A taker knows its stream. Collections take long, for they look at all requests."""

    async def main() -> weakref.ref[EngineStream]:
        stream = EngineStream("a", lambda: None)
        divert(stream, lambda news: stream is None)
        async with stream:
            stream.put(TokenEvent([1], finish_reason="length"))
        return weakref.ref(stream)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()
