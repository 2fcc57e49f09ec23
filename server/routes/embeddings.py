"""POST /v1/embeddings."""

from __future__ import annotations

import array
import asyncio
import base64
import sys
from typing import Any

from aiohttp import web

from jaxserve.engine.admission import Limits
from jaxserve.errors import InvalidRequestError
from server.body import json_object
from server.errors import context_length_exceeded
from server.protocol.tokens import parse_embedding
from server.replies import json_response, new_id
from server.service import SERVICE


async def embeddings(request: web.Request) -> web.Response:
    """One vector of length 1 per input."""
    service = request.app[SERVICE]
    wanted = parse_embedding(await json_object(request, service.config), service.config)
    model, info = service.model(wanted.model), service.info()
    inputs = await service.token_ids(wanted.inputs, wanted.add_special_tokens, "input")
    limits = Limits(info.max_model_len, info.vocab_size)
    for ids in inputs:
        if not ids:
            raise InvalidRequestError("input has no tokens; give at least one.", "input")
        if len(ids) >= info.max_model_len:
            raise context_length_exceeded(
                f"An input has {len(ids)} tokens, more than the model's context of "
                f"{info.max_model_len} can hold. Shorten it.",
                "input",
            )
        limits.check_token_ids("input", ids)
    request_id = new_id("embd")
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(service.engine.embed(f"{request_id}-{i}", ids, wanted.pooling))
                for i, ids in enumerate(inputs)
            ]
    except ExceptionGroup as failed:  # the others are cancelled by then
        raise failed.exceptions[0] from None
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(task.result(), wanted.base64)}
        for index, task in enumerate(tasks)
    ]
    count = sum(map(len, inputs))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _vector(values: list[float], as_base64: bool) -> Any:
    """Numbers, or their little-endian float32 bytes in base64."""
    if not as_base64:
        return values
    numbers = array.array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
