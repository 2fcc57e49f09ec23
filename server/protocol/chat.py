"""The wire of /v1/chat/completions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from jaxserve.errors import InvalidRequestError
from server.config import ServerConfig
from server.protocol.fields import (
    Field,
    Fields,
    boolean,
    choice,
    integer,
    no_op,
    passed_on,
    read,
    text,
    unsupported,
    wrong,
)
from server.protocol.sampling import COMMON, MAX_INT32, Options, options

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TEMPLATE_KWARGS = 64
RESERVED_KWARGS = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "self", "bos_token", "eos_token", "raise_exception", "tojson"),
    )
)
"""Names by which the template or its caller knows something else."""

FEW_MESSAGES = 16
_CONTENT = {"role", "content"}
_OWN_TEMPLATE = {"add_generation_prompt", "continue_final_message"}

_TOOLS = "tool calls are not available yet"
_MEDIA = "the model reads text only"
_MESSAGE_FIELDS = Fields(
    {
        "role": choice("Who speaks.", ROLES, "user"),
        "content": passed_on("A text, or a list of text parts.", {}),
        "name": text("The speaker's name, for templates that use it.", 256),
        "tool_call_id": text("The call that a tool's message answers.", 256),
        "tool_calls": passed_on("The calls of an assistant's message.", {"type": "array"}),
        "reasoning": passed_on("What the assistant thought.", {"type": "string"}),
        "reasoning_content": passed_on("The same, by its older name.", {"type": "string"}),
        "refusal": no_op("Templates have no place for it."),
        "annotations": no_op("Templates have no place for it."),
        "function_call": unsupported("use tool_calls"),
        "audio": unsupported(_MEDIA),
    }
)
TEMPLATE_FIELDS: dict[str, Field] = {
    "messages": passed_on(
        "The conversation so far.",
        {"type": "array", "items": {"type": "object"}, "minItems": 1},
        required=True,
    ),
    "add_generation_prompt": passed_on(
        "Begin the assistant's turn; the default unless continue_final_message.",
        {"type": "boolean"},
    ),
    "continue_final_message": boolean("Go on with the last message instead."),
    "add_special_tokens": boolean("Let the tokenizer add tokens around the rendered template."),
    "chat_template": passed_on(
        "Needs --trust-request-chat-template.", {"type": "string", "maxLength": 2**20}
    ),
    "chat_template_kwargs": passed_on("More variables for the template.", {"type": "object"}),
}
FIELDS = Fields(
    {
        **TEMPLATE_FIELDS,
        **COMMON,
        "max_tokens": integer("The older name of max_completion_tokens.", 1, MAX_INT32),
        "max_completion_tokens": integer(
            "Most tokens to generate; up to the context's end if absent.", 1, MAX_INT32
        ),
        "logprobs": boolean("Give log-probabilities."),
        "top_logprobs": passed_on(
            "Of this many likeliest tokens; needs logprobs.", {"type": "integer"}
        ),
        "echo": unsupported("the messages are not repeated; use continue_final_message", (False,)),
        "tools": unsupported(_TOOLS),
        "tool_choice": unsupported(_TOOLS, ("none",)),
        "parallel_tool_calls": no_op("There are no tool calls yet."),
        "functions": unsupported(_TOOLS),
        "function_call": unsupported(_TOOLS, ("none",)),
        "reasoning_effort": unsupported("pass what the template knows in chat_template_kwargs"),
        "include_reasoning": unsupported("reasoning is part of the text", (True,)),
        "documents": unsupported("put them into the messages"),
        "modalities": unsupported(_MEDIA, (["text"],)),
        "audio": unsupported(_MEDIA),
        "media_io_kwargs": unsupported(_MEDIA),
        "mm_processor_kwargs": unsupported(_MEDIA),
        "prediction": unsupported("there is no predicted output"),
        "verbosity": unsupported("say it in the messages", ("medium",)),
        "web_search_options": unsupported("the server has no access to the web"),
        "return_prompt_text": unsupported("use /tokenize and /detokenize", (False,)),
        "return_assistant_tokens_mask": unsupported("use /tokenize", (False,)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Checked messages and how to make a prompt of them.

    Attributes:
        messages: as templates want them: contents are strings, arguments of calls are objects.
        template: options of ``Tokenizer.apply_chat_template``.
    """

    messages: list[Message]
    template: dict[str, Any]
    add_special_tokens: bool

    @property
    def characters(self) -> int:
        """Of all contents."""
        return sum(len(message["content"] or "") for message in self.messages)

    @property
    def is_brief(self) -> bool:
        """Whether the model's own template sees a few contents, and nothing else of any length."""
        return (
            len(self.messages) <= FEW_MESSAGES
            and all(message.keys() == _CONTENT for message in self.messages)
            and self.template.keys() == _OWN_TEMPLATE
        )


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request for an answer."""

    conversation: Conversation
    options: Options


def parse_chat(
    body: Mapping[str, Any], config: ServerConfig, defaults: Mapping[str, Any]
) -> ChatRequest:
    """The request in a body of /v1/chat/completions."""
    values = read(FIELDS, body)
    if values["prompt_logprobs"] is not None and values["stream"]:
        raise InvalidRequestError("prompt_logprobs can't be streamed.", "prompt_logprobs")
    max_tokens = values["max_completion_tokens"] or values["max_tokens"]
    checked = options(
        values,
        config,
        defaults,
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=_logprobs(values["logprobs"], values["top_logprobs"], config.max_logprobs),
    )
    return ChatRequest(conversation=conversation(values, config), options=checked)


def _logprobs(wanted: bool, top: Any, most: int) -> int | None:
    if top is None:
        return 0 if wanted else None
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= most:
        raise wrong("top_logprobs", top, f"must be an integer from 0 to {most}")
    if not wanted:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    return top


def conversation(values: Mapping[str, Any], config: ServerConfig) -> Conversation:
    """The conversation in the values of TEMPLATE_FIELDS."""
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, "must be a list of messages, not empty")
    if len(messages) > config.max_messages:
        rule = f"may hold at most {config.max_messages}"
        raise wrong("messages", f"{len(messages)} messages", rule)
    goes_on, begins = values["continue_final_message"], values["add_generation_prompt"]
    if begins is not None and not isinstance(begins, bool):
        raise wrong("add_generation_prompt", begins, "must be true or false")
    if goes_on and begins:
        message = "continue_final_message and add_generation_prompt exclude each other."
        raise InvalidRequestError(message, "continue_final_message")
    template = _template_kwargs(values["chat_template_kwargs"])
    if values["chat_template"] is not None:
        template["chat_template"] = _chat_template(values["chat_template"], config)
    template["add_generation_prompt"] = not goes_on if begins is None else begins
    template["continue_final_message"] = goes_on
    return Conversation(
        messages=[_message(index, message) for index, message in enumerate(messages)],
        template=template,
        add_special_tokens=values["add_special_tokens"],
    )


def _template_kwargs(value: Any) -> dict[str, Any]:
    name = "chat_template_kwargs"
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_KWARGS:
        raise wrong(name, value, f"must be an object of at most {MAX_TEMPLATE_KWARGS} items")
    for key in value:
        if key in RESERVED_KWARGS or not key.isidentifier() or key.startswith("_"):
            raise wrong(name, key, "may not set this name")
    return dict(value)


def _chat_template(value: Any, config: ServerConfig) -> str:
    if not config.trust_request_chat_template:
        raise InvalidRequestError(
            "chat_template is not allowed in requests; the server would have to be started with "
            "--trust-request-chat-template.",
            "chat_template",
        )
    if not isinstance(value, str) or not 0 < len(value) <= 2**20:
        raise wrong("chat_template", value, "must be a string of 1 to 1048576 characters")
    return value


def _message(index: int, message: Any) -> Message:
    """One checked message, without what is absent."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise wrong(where, message, "must be an object")
    try:
        if message.get("role") is None:
            raise InvalidRequestError("role is missing; it is required.")
        values = read(_MESSAGE_FIELDS, message)
        checked = {name: value for name, value in values.items() if value is not None}
        role, calls = checked["role"], checked.get("tool_calls")
        checked["content"] = _content(checked.get("content"), role == "assistant" and bool(calls))
        if role == "tool" and "tool_call_id" not in checked:
            raise InvalidRequestError("tool_call_id is missing; a tool's message needs it.")
        if calls is not None:
            checked["tool_calls"] = [_tool_call(call) for call in _list("tool_calls", calls)]
        for name in ("reasoning", "reasoning_content"):
            if not isinstance(checked.get(name, ""), str):
                raise wrong(name, checked[name], "must be a string")
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error}", where) from None
    checked.pop("refusal", None)
    checked.pop("annotations", None)
    return checked


def _content(value: Any, may_be_absent: bool) -> str | None:
    """A content as one string: text parts are joined by newlines."""
    if value is None and may_be_absent:
        return None
    if isinstance(value, str):
        return value
    parts = []
    for part in _list("content", value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise wrong("content", part, 'must hold parts like {"type": "text", "text": "..."}')
        if kind not in ("text", "input_text", "refusal"):
            raise wrong("content", kind, f"may hold text parts only ({_MEDIA})")
        piece = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(piece, str):
            raise wrong("content", piece, "parts must have a text")
        parts.append(piece)
    return "\n".join(parts)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(
            name, value, "must be a string or a list" if name == "content" else "must be a list"
        )
    return value


def _tool_call(call: Any) -> dict[str, Any]:
    """A call of an earlier turn, its arguments as an object where they are one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong("tool_calls", call, 'must hold {"function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # What is no JSON the template shows as it came.
        with contextlib.suppress(orjson.JSONDecodeError):
            arguments = orjson.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}
