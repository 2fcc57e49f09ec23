"""The fields that say how to sample and what to give back, shared by all generating routes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.beam_search import BeamSearchParams
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling.params import SamplingParams
from server.config import MAX_STREAM_INTERVAL, ServerConfig
from server.protocol.beams import BEAM_FIELDS, beam_params
from server.protocol.fields import (
    Field,
    Schema,
    boolean,
    integer,
    no_op,
    passed_on,
    text,
    unsupported,
    wrong,
)

MAX_INT32 = 2**31 - 1
MAX_BEST_OF = 20
MAX_METADATA = 16
WHOLE_INTERVAL = 64
"""Tokens of a reply that isn't streamed that are looked at together. To wake a task for each costs
ten times as much as its text; to make the text of thousands at once would hold up the streams."""
ENGINE_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


def _number(low: float | None = None, high: float | None = None) -> Schema:
    limits = {"minimum": low, "maximum": high}
    return {"type": "number", **{key: value for key, value in limits.items() if value is not None}}


def _engine(name: str, doc: str, schema: Schema) -> Field:
    """A field of SamplingParams, which checks it; refused for as long as the engine lacks it."""
    if name in ENGINE_FIELDS:
        return passed_on(doc, schema)
    return unsupported("this engine has no such option yet", schema=schema)


def _flag(name: str, doc: str, default: bool) -> Field:
    return _engine(name, doc, {"type": "boolean", "default": default})


_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STRINGS: Schema = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

_DESCRIBED: dict[str, tuple[str, Schema]] = {
    "temperature": ("0 is greedy; the model's default if absent.", _number(0, 2)),
    "top_p": ("Keep the likeliest tokens up to this probability.", _number(0, 1)),
    "top_k": ("Keep this many tokens; 0 or -1 keeps all.", {"type": "integer", "minimum": -1}),
    "min_p": ("Keep tokens at least this fraction as likely as the best.", _number(0, 1)),
    "repetition_penalty": ("Above 1 makes seen tokens less likely.", _number(0.01)),
    "presence_penalty": ("Subtracted from the logit of each token seen.", _number(-2, 2)),
    "frequency_penalty": ("The same for each time that it was seen.", _number(-2, 2)),
    "seed": ("Makes the tokens reproducible.", {"type": "integer"}),
    "stop": ("Strings that end the text.", _STRINGS),
    "stop_token_ids": ("Token ids that end the text.", _IDS),
    "min_tokens": ("No end before this many tokens.", {"type": "integer", "minimum": 0}),
    "logit_bias": ("Token id to a number added to its logit.", {"type": "object"}),
    "allowed_token_ids": ("Only these token ids may be chosen.", _IDS),
    "bad_words": ("Texts that must not be generated.", _STRINGS),
    "truncate_prompt_tokens": (
        "Keep only this many of the prompt's last tokens; -1 keeps what fits.",
        {"type": "integer", "minimum": -1},
    ),
    "prompt_logprobs": ("Log-probabilities of the prompt's tokens.", {"type": "integer"}),
}
_FLAGS: dict[str, tuple[str, bool]] = {
    "ignore_eos": ("Go on after the model's end tokens.", False),
    "skip_special_tokens": ("Leave special tokens out of the text.", True),
    "spaces_between_special_tokens": ("No effect with the fast tokenizers used here.", True),
    "include_stop_str_in_output": ("Keep the stop string at the text's end.", False),
}
SAMPLING: dict[str, Field] = {
    **{name: _engine(name, doc, schema) for name, (doc, schema) in _DESCRIBED.items()},
    **{name: _flag(name, doc, default) for name, (doc, default) in _FLAGS.items()},
}
"""What goes to SamplingParams under its own name."""

_STREAM_OPTIONS = {
    "include_usage": boolean("One more chunk at the end with the usage."),
    "continuous_usage_stats": boolean("The usage so far in every chunk."),
    "include_obfuscation": no_op("Chunks are never padded."),
}


def _metadata(name: str, value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise wrong(name, value, f"must be an object of at most {MAX_METADATA} strings")
    for key, item in value.items():
        if not isinstance(item, str) or len(item) > 512 or len(key) > 64:
            rule = "must have keys of at most 64 characters and strings of at most 512"
            raise wrong(name, item, rule)
    return value


def _response_format(name: str, value: Any) -> None:
    if value != {"type": "text"}:
        message = 'response_format is not supported yet, except {"type": "text"}; leave it out.'
        raise InvalidRequestError(message, name)


def _cache_salt(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise wrong(name, value, "must be a string of 1 to 256 printable characters")
    return value


_GRAMMAR = "constrained output is not available yet"
_NOT_HERE = "this server has nothing that it could set"

COMMON: dict[str, Field] = {
    "model": text("One of the names that /v1/models lists; the first one if absent.", 1024),
    "stream": boolean("Send the text as server-sent events while it grows."),
    "stream_options": passed_on(
        "Needs stream.",
        {"type": "object", "properties": {name: f.schema for name, f in _STREAM_OPTIONS.items()}},
    ),
    **SAMPLING,
    "n": integer("Completions per prompt.", 1, MAX_INT32, 1),
    **BEAM_FIELDS,
    "priority": integer(
        "Lower goes first, where the engine schedules by priority.", -(2**31), MAX_INT32, 0
    ),
    "cache_salt": Field(
        _cache_salt,
        {"type": "string", "minLength": 1, "maxLength": 256},
        "Cached prefixes are shared only between requests with equal salts.",
    ),
    "truncation_side": unsupported("the prompt's beginning is cut off", ("left",)),
    "return_tokens_as_token_ids": boolean('Show tokens in logprobs as "token_id:N".'),
    "return_token_ids": boolean("Give the token ids too."),
    "response_format": Field(_response_format, {"type": "object"}, 'Only {"type": "text"} so far.'),
    **{
        name: unsupported(_GRAMMAR)
        for name in (
            *("structured_outputs", "guided_json", "guided_regex", "guided_choice"),
            *("guided_grammar", "guided_decoding_backend", "guided_whitespace_pattern"),
        )
    },
    "prompt_embeds": unsupported("prompts are texts or token ids"),
    "logprob_token_ids": unsupported("log-probabilities are of the likeliest tokens"),
    "repetition_detection": unsupported(_NOT_HERE),
    "thinking_token_budget": unsupported(_NOT_HERE),
    "kv_transfer_params": unsupported(_NOT_HERE),
    "vllm_xargs": unsupported(_NOT_HERE),
    "stream_interval": integer(
        "Send a chunk for so many tokens; the server's --stream-interval if absent.",
        1,
        MAX_STREAM_INTERVAL,
    ),
    "user": no_op("An end user's name."),
    "metadata": Field(_metadata, {"type": "object"}, "No effect. At most 16 short strings."),
    "store": no_op("Nothing is stored."),
    "service_tier": no_op("There is one tier."),
    "safety_identifier": no_op("An end user's name."),
    "prompt_cache_key": no_op("Prefixes are cached by their content."),
    "prompt_cache_retention": no_op("Prefixes stay cached while there is room."),
    "request_id": no_op("The X-Request-Id header is what replies and logs show."),
    "session_id": no_op("There are no sessions."),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a generating request wants besides its prompts and sampling settings.

    Attributes:
        n, best_of: completions returned and generated per prompt.
        params: of one completion each; ``params.n`` equals ``best_of``, but 1 with ``beams``.
        beams: the search that finds the completions instead of sampling; then ``params`` says how
            they are shown.
        max_tokens: asked for, None if the request didn't say; then params has a default, which the
            context's end cuts short.
        show_logprobs: the reply has log-probabilities; ``params.logprobs`` may be set without.
        stream_interval: tokens for which a streamed reply gets a chunk.
    """

    model: str | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    params: SamplingParams
    beams: BeamSearchParams | None
    n: int
    best_of: int
    max_tokens: int | None
    show_logprobs: bool
    priority: int
    cache_salt: str
    tokens_as_ids: bool
    return_token_ids: bool
    stream_interval: int

    @property
    def interval(self) -> int:
        """Tokens from one look at a completion to the next. Stop strings end it at the next one,
        so for their sake each token of a whole reply is looked at."""
        if self.stream:
            return self.stream_interval
        return 1 if self.params.stop else WHOLE_INTERVAL

    @property
    def only_text(self) -> bool:
        """Whether a stream's chunks tell of nothing but text until the last one."""
        return not (self.show_logprobs or self.return_token_ids or self.continuous_usage)


def options(
    values: Mapping[str, Any],
    config: ServerConfig,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> Options:
    """The checked options of a request.

    Args:
        values: of ``COMMON`` and perhaps "best_of".
        defaults: of SamplingParams, where the request says nothing.
        max_tokens: asked for, None if the request says nothing.
        default_max_tokens: then; None means up to the context's end.
        logprobs: as SamplingParams knows them.
    """
    usage = stream_options(values["stream_options"], values["stream"])
    n, best_of = values["n"], values.get("best_of") or values["n"]
    if n > config.max_n:
        raise wrong("n", n, f"must be from 1 to {config.max_n} here")
    if logprobs is not None and not 0 <= logprobs <= config.max_logprobs:
        raise wrong("logprobs", logprobs, f"must be from 0 to {config.max_logprobs}")
    if best_of < n or (best_of > MAX_BEST_OF and best_of != n):
        raise wrong("best_of", best_of, f"must be from n ({n}) to {MAX_BEST_OF}")
    if best_of > n and values["stream"]:
        raise InvalidRequestError("best_of larger than n can't be streamed.", "best_of")
    given = {name: values[name] for name in SAMPLING if values[name] is not None}
    fallback = defaults.get("max_tokens", default_max_tokens)
    most = fallback if max_tokens is None else max_tokens
    beams = beam_params(values, given, best_of, most)
    # Choosing the best of several needs the log-probability of each.
    wanted = 0 if logprobs is None and best_of > n else logprobs
    sampling = {
        **defaults,
        **given,
        "n": best_of,
        "max_tokens": most,
        "logprobs": wanted,
    }
    if beams is not None:  # the model's defaults are about sampling
        sampling = {**given, "n": 1, "max_tokens": most, "logprobs": wanted}
    return Options(
        model=values["model"],
        stream=values["stream"],
        include_usage=usage["include_usage"],
        continuous_usage=usage["continuous_usage_stats"],
        params=SamplingParams(**sampling),
        beams=beams,
        n=n,
        best_of=best_of,
        max_tokens=max_tokens,
        show_logprobs=logprobs is not None,
        priority=values["priority"],
        cache_salt=values["cache_salt"] or "",
        tokens_as_ids=values["return_tokens_as_token_ids"],
        return_token_ids=values["return_token_ids"],
        stream_interval=values["stream_interval"] or config.stream_interval,
    )


def stream_options(value: Any, stream: bool) -> dict[str, Any]:
    """The checked stream options."""
    if value is None:
        value = {}
    elif not isinstance(value, dict):
        raise wrong("stream_options", value, "must be an object")
    elif not stream:
        raise InvalidRequestError("stream_options needs stream to be true.", "stream_options")
    for name in value:
        if name not in _STREAM_OPTIONS:
            raise wrong("stream_options", name, f"has only {', '.join(_STREAM_OPTIONS)}")
    checked = {}
    for name, field in _STREAM_OPTIONS.items():
        item = value.get(name)
        checked[name] = (
            field.default if item is None else field.check(f"stream_options.{name}", item)
        )
    return checked
