"""The wire of /v1/completions and of the legacy /generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError
from server.config import ServerConfig
from server.protocol.fields import Fields, boolean, integer, passed_on, read, unsupported, wrong
from server.protocol.sampling import COMMON, MAX_BEST_OF, MAX_INT32, Options, options

Prompt = str | list[int]
DEFAULT_MAX_TOKENS = 16

_PROMPT = passed_on(
    "A text, a list of texts, a list of token ids, or a list of such lists.",
    {"oneOf": [{"type": "string"}, {"type": "array"}]},
    required=True,
)
_BEST_OF = integer(
    "Completions generated per prompt, of which the n likeliest are given.", 1, MAX_BEST_OF
)
_MAX_TOKENS = "Most tokens to generate"
FIELDS = Fields(
    {
        "prompt": _PROMPT,
        **COMMON,
        "max_tokens": integer(f"{_MAX_TOKENS}; 16 if absent, 0 only with echo.", 0, MAX_INT32),
        "best_of": _BEST_OF,
        "echo": boolean("Begin the text with the prompt."),
        "logprobs": passed_on(
            "Log-probabilities of this many likeliest tokens.", {"type": "integer", "minimum": 0}
        ),
        "suffix": unsupported("the model can't fill in", ("",)),
        "add_special_tokens": boolean("Let the tokenizer add the tokens that begin a text.", True),
    }
)
GENERATE_FIELDS = Fields(
    {
        "prompt": _PROMPT,
        **COMMON,
        "max_tokens": integer(f"{_MAX_TOKENS}; 16 if absent.", 1, MAX_INT32),
        "best_of": _BEST_OF,
    }
)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request for completions.

    Attributes:
        prompts: texts or lists of token ids, none of them empty.
        echo: begin the text with the prompt.
        drop_output: only the prompt is wanted (echo with max_tokens 0); one token is generated.
    """

    prompts: list[Prompt]
    options: Options
    echo: bool = False
    drop_output: bool = False
    add_special_tokens: bool = True


def parse_completion(
    body: Mapping[str, Any], config: ServerConfig, defaults: Mapping[str, Any]
) -> CompletionRequest:
    """The request in a body of /v1/completions."""
    values = read(FIELDS, body)
    max_tokens = values["max_tokens"]
    echo = values["echo"]
    if max_tokens == 0 and not echo:
        raise wrong("max_tokens", 0, "must be at least 1 unless echo is true")
    logprobs = values["logprobs"]
    if logprobs is not None and (isinstance(logprobs, bool) or not isinstance(logprobs, int)):
        raise wrong("logprobs", logprobs, "must be an integer")
    if echo and logprobs is not None and values["use_beam_search"]:
        raise InvalidRequestError("echo with logprobs can't be had with use_beam_search.", "echo")
    if echo and logprobs is not None and values["prompt_logprobs"] is None:
        values["prompt_logprobs"] = logprobs
    if values["prompt_logprobs"] is not None and values["stream"] and not echo:
        raise InvalidRequestError("prompt_logprobs can't be streamed.", "prompt_logprobs")
    checked = options(
        values,
        config,
        defaults,
        max_tokens=1 if max_tokens == 0 else max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=logprobs,
    )
    return CompletionRequest(
        prompts=prompts("prompt", values["prompt"], config.max_prompts),
        options=checked,
        echo=echo,
        drop_output=max_tokens == 0,
        add_special_tokens=values["add_special_tokens"],
    )


def parse_generate(
    body: Mapping[str, Any], config: ServerConfig, defaults: Mapping[str, Any]
) -> CompletionRequest:
    """The request in a body of /generate: one prompt, and the names of SamplingParams."""
    values = read(GENERATE_FIELDS, body)
    checked = options(
        values,
        config,
        defaults,
        max_tokens=values["max_tokens"],
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=None,
    )
    return CompletionRequest(prompts=prompts("prompt", values["prompt"], 1), options=checked)


def prompts(name: str, value: Any, most: int) -> list[Prompt]:
    """The prompts of any of the four forms, none of them empty; see ``_is_ids`` for what is left to
    ``Service.admit``."""
    items = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(items, list) or not items:
        raise wrong(name, value, "must be a text, token ids, or a list of either, not empty")
    if len(items) > most:
        raise wrong(name, f"{len(items)} of them", f"may hold at most {most}")
    if not all(isinstance(one, str) for one in items) and not all(map(_is_ids, items)):
        raise wrong(name, value, "must hold either texts or lists of integers only, none empty")
    if not all(items):
        raise InvalidRequestError(f"{name} is empty; give at least one character or token.", name)
    return items


def _is_ids(value: Any) -> bool:
    """Whether it is a list that begins with an integer. The others are looked at when its length
    is known to fit into the context: there may be millions."""
    return isinstance(value, list) and bool(value) and type(value[0]) is int
