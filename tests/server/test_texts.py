"""Where texts are worked on: short ones at once, all others in a thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from jaxserve import demo
from jaxserve.tokenizer import Tokenizer
from server.config import ServerConfig
from server.protocol.chat import parse_chat
from server.texts import SMALL_CHARACTERS, Texts

USER = {"role": "user", "content": "Hello"}
CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "at_once"),
    [
        ({"messages": [USER]}, True),
        ({"messages": [{"role": "system", "content": "Be brief."}, USER]}, True),
        ({"messages": [{**USER, "content": "a" * SMALL_CHARACTERS}]}, True),
        ({"messages": [{**USER, "content": "a" * (SMALL_CHARACTERS + 1)}]}, False),
        ({"messages": [{**USER, "content": ""}] * 1000}, False),
        ({"messages": [{**USER, "name": "b" * 200}]}, False),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, False),
        ({"messages": [USER], "chat_template_kwargs": {"notes": "c" * 10_000}}, False),
        ({"messages": [USER], "chat_template": "{{ range(9) | list }}"}, False),
    ],
)
def test_only_short_conversations_of_nothing_but_contents_are_rendered_at_once(
    body: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def chat(*args: Any, **options: Any) -> tuple[str, list[int]]:
        threads.append(threading.current_thread())
        return "", [1]

    tokenizer = Tokenizer(str(demo.target_path()))
    monkeypatch.setattr(tokenizer, "chat", chat)
    texts = Texts(tokenizer, 8)
    config = ServerConfig(trust_request_chat_template=True)
    wanted = parse_chat(body, config, {})
    assert asyncio.run(texts.render(wanted.conversation, 10_000)) == [1]
    assert (threads == [threading.main_thread()]) == at_once
    texts.close()
