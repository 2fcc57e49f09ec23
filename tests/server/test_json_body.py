"""Bodies become JSON objects, strictly, and large ones away from the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import InvalidRequestError
from server import body as body_module
from server.protocol.json_body import MAX_DEPTH, parse_object
from tests.helpers.serving import front_end

TEXTS = st.text(alphabet='[]{}"\\a\n/', max_size=8)
LEAVES = st.one_of(st.integers(0, 9), TEXTS, st.none())
VALUES = st.recursive(
    LEAVES,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXTS, children, max_size=3),
    max_leaves=8,
)
PADDING = [[]] * MAX_DEPTH
"""So many brackets that the nesting is looked at."""


def depth_of(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, children), default=0) if isinstance(value, dict | list) else 0


@given(VALUES, st.integers(0, 5), st.booleans())
def test_nesting_is_counted_without_what_stands_in_strings(
    value: Any, more: int, objects: bool
) -> None:
    for _ in range(MAX_DEPTH - 6 + more):
        value = {"[": value} if objects else [value]
    whole = {"value": value, "padding": PADDING}
    text = json.dumps(whole).encode()
    if depth_of(whole) <= MAX_DEPTH:
        assert parse_object(text) == whole
    else:
        with pytest.raises(InvalidRequestError, match="nested more than 64 levels"):
            parse_object(text)


def ids_of(count: int) -> bytes:
    return b'{"prompt":[' + b"5," * count + b'"x"]}'


def test_a_prompt_longer_than_the_context_is_refused_before_its_ids_are_looked_at() -> None:
    async def main() -> None:
        async with front_end() as front:
            for path in ("/v1/completions", "/v1/embeddings"):
                for count, code in ((100, None), (3000, "context_length_exceeded")):
                    data = ids_of(count)
                    if path == "/v1/embeddings":
                        data = data.replace(b'"prompt"', b'"input"')
                    headers = {"Content-Type": "application/json"}
                    status, reply = await front.post(path, data=data, headers=headers)
                    assert (status, reply["error"]["code"]) == (400, code)

    asyncio.run(main())


@pytest.mark.parametrize(("count", "in_loop"), [(100, True), (100_000, False)])
def test_large_bodies_are_parsed_in_a_thread(
    count: int, in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def parse(data: bytes) -> Any:
        threads.append(threading.get_ident())
        return parse_object(data)

    monkeypatch.setattr(body_module, "parse_object", parse)

    async def main() -> None:
        async with front_end() as front:
            headers = {"Content-Type": "application/json"}
            await front.post("/v1/completions", data=ids_of(count), headers=headers)

    asyncio.run(main())
    assert [thread == threading.get_ident() for thread in threads] == [in_loop]
