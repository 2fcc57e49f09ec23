"""The wire of /tokenize, /detokenize and /v1/embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError
from server.config import ServerConfig
from server.protocol.chat import TEMPLATE_FIELDS, Conversation, conversation
from server.protocol.completions import Prompt, prompts
from server.protocol.fields import (
    Fields,
    boolean,
    choice,
    no_op,
    passed_on,
    read,
    text,
    unsupported,
    wrong,
)

_MODEL = text("One of the names that /v1/models lists; the first one if absent.", 1024)
TOKENIZE_FIELDS = Fields(
    {
        "model": _MODEL,
        "prompt": passed_on("A text; or messages.", {"type": "string"}),
        **TEMPLATE_FIELDS,
        "messages": passed_on("A conversation, instead of a prompt.", {"type": "array"}),
        "add_special_tokens": passed_on(
            "Add the tokens that begin a text; by default for a prompt only.", {"type": "boolean"}
        ),
        "return_token_strs": boolean("Give each token as text too."),
    }
)
DETOKENIZE_FIELDS = Fields(
    {
        "model": _MODEL,
        "tokens": passed_on(
            "Token ids.",
            {"type": "array", "items": {"type": "integer", "minimum": 0}},
            required=True,
        ),
    }
)
EMBEDDING_FIELDS = Fields(
    {
        "model": _MODEL,
        "input": passed_on(
            "A text, a list of texts, a list of token ids, or a list of such lists.",
            {"oneOf": [{"type": "string"}, {"type": "array"}]},
            required=True,
        ),
        "encoding_format": choice("How numbers are written.", ("float", "base64"), "float"),
        "pooling": choice("Of the tokens' last hidden states.", ("last", "mean"), "last"),
        "add_special_tokens": boolean("Let the tokenizer add the tokens that begin a text.", True),
        "dimensions": unsupported("the model gives vectors of one size"),
        "user": no_op("An end user's name."),
        "priority": no_op("Embeddings are computed in the order of their arrival."),
    }
)


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """A checked request for token ids: of a prompt or of a conversation."""

    model: str | None
    prompt: str | None
    conversation: Conversation | None
    add_special_tokens: bool
    return_token_strs: bool


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """A checked request for embeddings."""

    model: str | None
    inputs: list[Prompt]
    base64: bool
    pooling: str
    add_special_tokens: bool


def parse_tokenize(body: Mapping[str, Any], config: ServerConfig) -> TokenizeRequest:
    """The request in a body of /tokenize."""
    values = read(TOKENIZE_FIELDS, body)
    prompt, messages, special = values["prompt"], values["messages"], values["add_special_tokens"]
    if (prompt is None) == (messages is None):
        raise InvalidRequestError("Give either prompt or messages.", "prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise wrong("prompt", prompt, "must be a string")
    if special is not None and not isinstance(special, bool):
        raise wrong("add_special_tokens", special, "must be true or false")
    values["add_special_tokens"] = bool(special)
    return TokenizeRequest(
        model=values["model"],
        prompt=prompt,
        conversation=None if messages is None else conversation(values, config),
        add_special_tokens=special is not False,
        return_token_strs=values["return_token_strs"],
    )


def parse_detokenize(body: Mapping[str, Any]) -> tuple[str | None, list[int]]:
    """(model, token ids) of a body of /detokenize."""
    values = read(DETOKENIZE_FIELDS, body)
    tokens = values["tokens"]
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise wrong("tokens", tokens, "must be a list of integers")
    return values["model"], tokens


def parse_embedding(body: Mapping[str, Any], config: ServerConfig) -> EmbeddingRequest:
    """The request in a body of /v1/embeddings."""
    values = read(EMBEDDING_FIELDS, body)
    return EmbeddingRequest(
        model=values["model"],
        inputs=prompts("input", values["input"], config.max_prompts),
        base64=values["encoding_format"] == "base64",
        pooling=values["pooling"],
        add_special_tokens=values["add_special_tokens"],
    )
