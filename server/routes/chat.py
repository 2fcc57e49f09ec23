"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiohttp import web

from server import sse
from server.beams import make_run
from server.body import json_object
from server.completion import Completion, Delta
from server.generation import Run
from server.logprobs import chat_logprobs, prompt_logprobs
from server.protocol.chat import parse_chat
from server.protocol.sampling import Options
from server.replies import head, json_response, new_id, usage_chunk
from server.service import SERVICE


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a conversation."""
    service = request.app[SERVICE]
    body = await json_object(request, service.config)
    wanted = parse_chat(body, service.config, service.defaults)
    model = service.model(wanted.options.model)
    options = await service.texts.with_bad_words(wanted.options)
    prompt = await service.conversation(wanted.conversation, options)
    request_id, role = new_id("chatcmpl-"), service.config.response_role
    service.log_request(request_id, [prompt], options)
    async with make_run(service, request_id, [prompt], options) as run:
        if options.stream:
            start = head(request_id, "chat.completion.chunk", model)
            stream = _Stream(run, start, role)
            only_text = options.only_text
            return await sse.respond(request, run, stream.show, stream.last, brief=only_text)
        await run.finish()
    start = head(request_id, "chat.completion", model)
    choices = [_whole(one, options, role) for one in run.best()]
    return json_response({**start, "choices": choices, "usage": run.usage()})


class _Stream:
    """The chunks of a streamed reply."""

    def __init__(self, run: Run, start: dict[str, Any], role: str) -> None:
        self._run, self._start, self._role = run, start, role
        self._usage: dict[str, Any] = {"usage": None} if run.options.include_usage else {}
        self._begun: set[int] = set()

    def show(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A chunk if there is something to say, and before a choice's first one its opening."""
        options, number = self._run.options, delta.completion.number
        if options.continuous_usage:
            self._usage = {"usage": self._run.usage()}
        if number not in self._begun:
            self._begun.add(number)
            opening = {"role": self._role, "content": ""}
            choice = {"index": number, "delta": opening, "logprobs": None, "finish_reason": None}
            yield {**self._start, "choices": [choice], **self._usage}
        worth = delta.text or delta.finish_reason is not None
        if worth or options.show_logprobs or options.return_token_ids:
            yield {**self._start, "choices": [_part(delta, options)], **self._usage}

    def last(self) -> Iterator[dict[str, Any]]:
        """The usage, if it was asked for."""
        if self._run.options.include_usage:
            yield usage_chunk(self._start, self._run.usage())


def _part(delta: Delta, options: Options) -> dict[str, Any]:
    choice = {"index": delta.completion.number, "delta": {"content": delta.text}}
    return {**choice, **_rest(delta, options)}


def _whole(completion: Completion, options: Options, role: str) -> dict[str, Any]:
    delta = completion.whole()
    message = {"role": role, "content": delta.text, "refusal": None}
    choice = {"index": completion.number, "message": message, **_rest(delta, options)}
    if options.return_token_ids:
        choice["prompt_token_ids"] = completion.prompt.token_ids
    if completion.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(completion.prompt_logprobs)
    return choice


def _rest(delta: Delta, options: Options) -> dict[str, Any]:
    """What a choice and a part of one have in common."""
    logprobs = None
    if options.show_logprobs and delta.logprobs is not None:
        top, as_ids = options.params.logprobs or 0, options.tokens_as_ids
        logprobs = chat_logprobs(delta.token_ids, delta.logprobs, top, as_ids)
    rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": delta.finish_reason}
    if delta.finish_reason is not None:
        rest["stop_reason"] = delta.stop_reason
    if options.return_token_ids:
        rest["token_ids"] = delta.token_ids
    return rest
