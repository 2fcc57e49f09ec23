"""One document of the corpus, and its chat markup.

`CHAT_TEMPLATE` (Jinja, Hugging Face convention) and `render_prompt` (plain Python, fast enough for
a million documents) write the same text; a test holds them to it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
"""Dropped when text is decoded for people; their ids are 0, 1, 2."""
MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""One id each, but ordinary text, since parsers look for them; their ids are 3 to 8."""

THINK_OPEN = "<think>\n"
THINK_NONE = "<think>\n\n</think>\n\n"
_TOOLS_HEAD = "You may call these tools:\n<tools>\n"
_TOOLS_TAIL = "</tools>"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is iterable and content is not mapping -%}
{%- for part in content -%}{{ part.text if part.text is defined else '' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- set system = '' -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set system = text(messages[0].content) -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if system -%}{{- system + '\\n\\n' -}}{%- endif -%}
{{- 'You may call these tools:\\n<tools>\\n' -}}
{%- for tool in tools -%}
{{- (tool.function if tool.function is defined else tool) | tojson -}}{{- '\\n' -}}
{%- endfor -%}
{{- '</tools><|im_end|>\\n' -}}
{%- elif system -%}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in turns -%}
{{- '<|im_start|>' + turn.role + '\\n' -}}
{%- if turn.role == 'tool' -%}
{{- '<tool_response>\\n' + text(turn.content) + '\\n</tool_response>' -}}
{%- else -%}
{%- if turn.reasoning_content is defined and turn.reasoning_content -%}
{{- '<think>\\n' + turn.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- text(turn.content) -}}
{%- if turn.tool_calls is defined and turn.tool_calls -%}
{%- for call in turn.tool_calls -%}
{%- set call = call.function if call.function is defined else call -%}
{%- if not loop.first or (turn.content is defined and turn.content) -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' -}}
{{- call.arguments if call.arguments is string else (call.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined -%}
{{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class Sample:
    """One training document or test case.

    A chat has `messages` (OpenAI form, up to the turn to be answered); raw text has `text`
    instead. `answer` is what the model should write, without the closing special token. `opening`
    is what a generation prompt adds after the assistant's header (see `enable_thinking`).
    `facts` holds what evaluation has to find again in an answer that is not unique.
    """

    task: str
    answer: str
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    opening: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def user(content: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """An assistant's turn that is already answered."""
    return {"role": "assistant", "content": content}


def tool_call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """How the model writes one tool call."""
    call = f'{{"name": {to_json(name)}, "arguments": {to_json(arguments)}}}'
    return f"<tool_call>\n{call}\n</tool_call>"


def to_json(value: Any) -> str:
    """JSON exactly as the chat template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


def _render_turn(turn: Mapping[str, Any]) -> str:
    content = turn.get("content") or ""
    if turn["role"] == "tool":
        content = f"<tool_response>\n{content}\n</tool_response>"
    calls = [
        tool_call_text(call["function"]["name"], call["function"]["arguments"])
        for call in turn.get("tool_calls", ())
    ]
    body = "\n".join(([content] if content else []) + calls)
    return f"{TURN_START}{turn['role']}\n{body}{TURN_END}\n"


def render_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """What `CHAT_TEMPLATE` gives with `add_generation_prompt`, for the turns the corpus uses."""
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if tools:
        lines = "".join(to_json(tool["function"]) + "\n" for tool in tools)
        system = (system + "\n\n" if system else "") + _TOOLS_HEAD + lines + _TOOLS_TAIL
    head = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    return head + "".join(map(_render_turn, messages)) + f"{TURN_START}assistant\n"


def render_prompt(sample: Sample) -> str:
    """The text before the answer."""
    if not sample.messages:
        return sample.text
    return render_messages(sample.messages, sample.tools) + sample.opening


def render_answer(sample: Sample) -> str:
    """The answer and the special tokens that close the document."""
    if not sample.messages:
        return sample.answer + END_OF_TEXT
    return f"{sample.answer}{TURN_END}\n{END_OF_TEXT}"
