"""Conversations for tests of chat prompts."""

from __future__ import annotations

from collections.abc import Sequence


def message(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def conversation(
    history: Sequence[tuple[str, str]], query: str, system: str | None = None
) -> list[dict[str, str]]:
    """A system message if there is one, questions with their answers, and a last question."""
    messages = [] if system is None else [message("system", system)]
    for question, answer in history:
        messages += [message("user", question), message("assistant", answer)]
    return [*messages, message("user", query)]
