"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from server import sse
from server.beams import make_run
from server.body import json_object
from server.completion import Completion, Delta
from server.generation import Run
from server.logprobs import CompletionLogprobs, prompt_logprobs
from server.protocol.completions import CompletionRequest, parse_completion
from server.replies import head, json_response, new_id, usage_chunk
from server.service import SERVICE, Prompt, Service


async def completions(request: web.Request) -> web.StreamResponse:
    """Completes prompts."""
    service = request.app[SERVICE]
    body = await json_object(request, service.config)
    wanted = parse_completion(body, service.config, service.defaults)
    model = service.model(wanted.options.model)
    options = await service.texts.with_bad_words(wanted.options)
    prompts = await service.prompts(wanted.prompts, wanted.add_special_tokens, options)
    echoes = [await _echo(service, prompt) if wanted.echo else "" for prompt in prompts]
    request_id = new_id("cmpl-")
    service.log_request(request_id, prompts, options)
    start = head(request_id, "text_completion", model)
    async with make_run(service, request_id, prompts, options) as run:
        choices = [
            _Choice(wanted, one, echoes[number // options.best_of], service.texts.token)
            for number, one in enumerate(run.completions)
        ]
        if options.stream:
            stream = _Stream(run, choices, start)
            only_text = options.only_text
            return await sse.respond(request, run, stream.show, stream.last, brief=only_text)
        await run.finish()
        whole = [choices[one.number].whole() for one in run.best()]
    for index, choice in enumerate(whole):
        choice["index"] = index
    return json_response({**start, "choices": whole, "usage": _usage(run, wanted)})


async def _echo(service: Service, prompt: Prompt) -> str:
    """A prompt as text."""
    if prompt.text is not None:
        return prompt.text
    return await service.texts.decode(prompt.token_ids, "echo")


def _usage(run: Run, wanted: CompletionRequest) -> dict[str, Any]:
    usage = run.usage()
    if wanted.drop_output:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return usage


class _Stream:
    """The chunks of a streamed reply."""

    def __init__(self, run: Run, choices: list[_Choice], start: dict[str, Any]) -> None:
        self._run, self._choices, self._start = run, choices, start
        self._usage: dict[str, Any] = {"usage": None} if run.options.include_usage else {}

    def show(self, delta: Delta) -> tuple[dict[str, Any], ...]:
        """A chunk, if there is something to say."""
        choice = self._choices[delta.completion.number].part(delta)
        if choice is None:
            return ()
        if self._run.options.continuous_usage:
            self._usage = {"usage": self._run.usage()}
        return ({**self._start, "choices": [choice], **self._usage},)

    def last(self) -> Iterator[dict[str, Any]]:
        """The usage, if it was asked for."""
        if self._run.options.include_usage:
            yield usage_chunk(self._start, _usage(self._run, self._choices[0].wanted))


class _Choice:
    """One entry of "choices": as a whole, or part by part.

    Args:
        wanted: the request.
        completion: what it shows.
        echo: the prompt's text if it is to be repeated, else empty.
        show: a token as text.
    """

    def __init__(
        self,
        wanted: CompletionRequest,
        completion: Completion,
        echo: str,
        show: Callable[[int], str],
    ) -> None:
        self.wanted = wanted
        self._completion = completion
        self._echo = echo
        self._begun = False
        self._logprobs = CompletionLogprobs(show, wanted.options.tokens_as_ids)

    def whole(self) -> dict[str, Any]:
        """The choice of a reply that isn't streamed."""
        choice = self._entry(self._completion.whole())
        if self._completion.prompt_logprobs is not None and not self.wanted.echo:
            choice["prompt_logprobs"] = prompt_logprobs(self._completion.prompt_logprobs)
        return choice

    def part(self, delta: Delta) -> dict[str, Any] | None:
        """The choice of the next chunk; None if there is nothing to say."""
        shown = self.wanted.options
        worth = delta.text or delta.finish_reason is not None or not self._begun
        if not worth and not (shown.show_logprobs or shown.return_token_ids):
            return None
        return self._entry(delta)

    def _entry(self, delta: Delta) -> dict[str, Any]:
        options = self.wanted.options
        text, token_ids, logprobs = delta.text, delta.token_ids, delta.logprobs
        if self.wanted.drop_output:
            text, token_ids, logprobs = "", [], []
        first, self._begun = not self._begun, True
        prompt_ids = self._completion.prompt.token_ids
        choice: dict[str, Any] = {
            "index": self._completion.number,
            "text": self._echo + text if first else text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if options.return_token_ids:
            choice["token_ids"] = token_ids
            if first:
                choice["prompt_token_ids"] = prompt_ids
        if options.show_logprobs:
            echoed = self._completion.prompt_logprobs if self.wanted.echo and first else None
            choice["logprobs"] = self._logprobs.add(
                [*(prompt_ids if echoed else ()), *token_ids], [*(echoed or ()), *(logprobs or ())]
            )
        return choice
