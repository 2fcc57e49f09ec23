"""POST /generate, the request that vLLM's first server knew."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from aiohttp import web

from server import sse
from server.beams import make_run
from server.body import json_object
from server.completion import Delta
from server.protocol.completions import parse_generate
from server.replies import json_response, new_id
from server.service import SERVICE

LINES = "application/x-ndjson"
LINE_BY_LINE = sse.Format({"Content-Type": LINES}, lambda piece: orjson.dumps(piece) + b"\n")
ZERO_BYTES = sse.Format(
    {"Content-Type": "application/json"}, lambda piece: orjson.dumps(piece) + b"\0"
)


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
    request_id = new_id("generate-")
    service.log_request(request_id, prompts, options)
    async with make_run(service, request_id, prompts, options) as run:
        if not options.stream:
            await run.finish()
            return json_response({"text": [prompt + one.output.text for one in run.best()]})
        lines = LINES in request.headers.get("Accept", "")

        def show(delta: Delta) -> Iterator[dict[str, list[str]]]:
            if delta.text or delta.finish_reason is not None:
                yield {"text": [prompt + one.output.text for one in run.completions]}

        return await sse.respond(request, run, show, form=LINE_BY_LINE if lines else ZERO_BYTES)
