"""Conversations as text: the tokenizer's template and what transformers does around it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

MESSAGE = {"role", "content"}
OPTIONS = {"add_generation_prompt", "continue_final_message"}
COMPILE = "_compile_jinja_template"
"""Not public, so a release of transformers may lack it."""


def render(hf: Any, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
    """The prompt text of a conversation, as ``hf.apply_chat_template`` makes it. Raises whatever
    the template raises.

    What transformers does with messages before the template sees them changes nothing about plain
    ones, and takes longer than the template itself.

    Args:
        hf: the tokenizer.
        options: of ``hf.apply_chat_template``.
    """
    if not (_is_plain(messages, options) and _has_usual_ways(hf.__class__)):
        return str(hf.apply_chat_template(list(messages), tokenize=False, **options))
    return _compiled(hf.get_chat_template()).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=options.get("add_generation_prompt", False),
        **hf.special_tokens_map,
    )


def _is_plain(messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> bool:
    """Whether the messages are some roles and contents, to be answered."""
    return (
        bool(messages)
        and options.keys() <= OPTIONS
        and not options.get("continue_final_message")
        and all(
            type(message) is dict
            and message.keys() == MESSAGE
            and type(message["role"]) is type(message["content"]) is str
            for message in messages
        )
    )


@functools.cache
def _has_usual_ways(kind: type) -> bool:
    """Whether tokenizers of this class render as transformers' usually do, by ways that we know."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    names = ("apply_chat_template", "get_chat_template")
    usual = all(getattr(kind, name) is getattr(PreTrainedTokenizerBase, name) for name in names)
    return usual and hasattr(chat_template_utils, COMPILE)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A template in the sandbox that transformers gives to it."""
    from transformers.utils import chat_template_utils

    sandbox = getattr(chat_template_utils, COMPILE)(template).environment
    compiled = sandbox.from_string(template)
    compiled.globals = dict(compiled.globals)  # every rendering goes through them twice
    return compiled
