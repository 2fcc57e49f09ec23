"""POST /v1/embeddings."""

from __future__ import annotations

import array
import asyncio
import base64
import sys
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from jaxserve.errors import InvalidRequestError
from server.body import json_object
from server.engine_client import EngineClient
from server.errors import context_length_exceeded
from server.protocol.tokens import parse_embedding
from server.replies import json_response, new_id
from server.service import SERVICE, Service


async def embeddings(request: web.Request) -> web.Response:
    """One vector of length 1 per input."""
    service = request.app[SERVICE]
    wanted = parse_embedding(await json_object(request, service.config), service.config)
    model = service.model(wanted.model)
    inputs = await service.token_ids(wanted.inputs, wanted.add_special_tokens, "input")
    num_tokens = sum(map(len, inputs))
    await service.off_loop(lambda: _check(inputs, service), num_tokens)
    service.under_way += 1
    try:
        vectors = await _embed_all(inputs, wanted.pooling, service.engine)
    finally:
        service.under_way -= 1
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(vector, wanted.base64)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _check(inputs: Sequence[Sequence[int]], service: Service) -> None:
    """Refuses what the engine could not take, now or ever."""
    info, most = service.info(), service.config.max_queue
    if len(inputs) > most:
        message = f"{len(inputs)} inputs in one request are more than the queue's {most}."
        raise InvalidRequestError(message, "input")
    for ids in inputs:
        if not ids:
            raise InvalidRequestError("input has no tokens; give at least one.", "input")
        if len(ids) >= info.max_model_len:
            raise context_length_exceeded(
                f"An input has {len(ids)} tokens, more than the model's context of "
                f"{info.max_model_len} can hold. Shorten it.",
                "input",
            )
        info.limits.check_token_ids("input", ids)


async def _embed_all(
    inputs: Sequence[list[int]], pooling: str, engine: EngineClient
) -> list[list[float]]:
    """A vector for each; all are given up if one fails."""
    request_id = new_id("embd-")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index, ids in enumerate(inputs):
                embedding = engine.embed(f"{request_id}-{index}", ids, pooling)
                tasks.append(group.create_task(embedding))
                await asyncio.sleep(0)  # handing over a long input takes a moment
    except ExceptionGroup as failed:  # the others are cancelled by then
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _vector(values: list[float], as_base64: bool) -> Any:
    """Numbers, or their little-endian float32 bytes in base64."""
    if not as_base64:
        return values
    numbers = array.array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
