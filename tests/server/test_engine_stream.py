"""The events of one request: what is diverted and what is read are together all, in order."""

from __future__ import annotations

import asyncio
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
