"""POST /generate, the request that vLLM's first server knew."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from aiohttp import web

from server.beams import make_run
from server.body import json_object
from server.errors import api_error
from server.generation import Run
from server.protocol.completions import parse_generate
from server.replies import json_response, new_id
from server.service import SERVICE
from server.sse import TimedResponse

LINES = "application/x-ndjson"


async def generate(request: web.Request) -> web.StreamResponse:
    """Completes one prompt: {"text": [prompt + completion, ...]}.

    Streamed, it is such an object with the whole texts so far for each piece of news, and after
    each a zero byte, or a line break for clients that accept ``application/x-ndjson``.
    """
    service = request.app[SERVICE]
    body = await json_object(request, service.config)
    wanted = parse_generate(body, service.config, service.defaults)
    service.model(wanted.options.model)
    options = await service.texts.with_bad_words(wanted.options)
    prompts = await service.prompts(wanted.prompts, True, options)
    prompt = prompts[0].text
    if prompt is None:
        prompt = await service.texts.decode(prompts[0].token_ids, "prompt")
    request_id = new_id("generate")
    service.log_request(request_id, prompts, options)
    async with make_run(service, request_id, prompts, options) as run:
        if not options.stream:
            await run.finish()
            return json_response({"text": [prompt + one.output.text for one in run.best()]})
        lines = LINES in request.headers.get("Accept", "")
        pieces = _pieces(run, prompt, b"\n" if lines else b"\0")
        first = await anext(pieces)  # what fails before it has its own status
        headers = {"Content-Type": LINES if lines else "application/json"}
        async with TimedResponse(request, headers) as response:
            await response.write(first)
            async for piece in pieces:
                await response.write(piece)
            return await response.end()


async def _pieces(run: Run, prompt: str, end: bytes) -> AsyncIterator[bytes]:
    """The texts so far, whenever one has grown; at last an error object if something fails."""
    begun = False
    try:
        async for delta in run:
            if delta.text or delta.finish_reason is not None:
                begun = True
                texts = [prompt + one.output.text for one in run.completions]
                yield orjson.dumps({"text": texts}) + end
    except ConnectionError:
        raise
    except Exception as error:
        if not begun:
            raise
        yield orjson.dumps(api_error(error).body()) + end
