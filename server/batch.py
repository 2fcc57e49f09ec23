"""A file of requests in OpenAI's batch format, answered by the routes' own code without HTTP.

A line is {"custom_id", "method": "POST", "url", "body"}; its answer {"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}. A request that a route refuses has the refusal as
its body; "error" is for lines that never became a request.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import EMPTY_PAYLOAD, web

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineClosedError
from server.app import create_app
from server.config import ServerConfig
from server.engine_client import EngineClient
from server.engine_supervisor import EngineProcess
from server.errors import api_error
from server.front_end import load_tokenizer, model_names
from server.routes.chat import chat_completions
from server.routes.completions import completions
from server.routes.embeddings import embeddings

ROUTES: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
}
POLL_S = 0.02


class LocalRequest:
    """What the routes read of an aiohttp request.

    Args:
        app: whose engine answers.
        body: JSON.
    """

    content_type = "application/json"
    content = EMPTY_PAYLOAD

    def __init__(self, app: web.Application, body: bytes) -> None:
        self.app = app
        self.headers: dict[str, str] = {}
        self.content_length = len(body)
        self._body = body

    async def read(self) -> bytes:
        """The body."""
        return self._body


@dataclass
class Counts:
    """How many lines got an answer, and how many a refusal."""

    completed: int = 0
    failed: int = 0


def run_batch(
    engine: EngineConfig,
    config: ServerConfig,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    done: Callable[[], object] = lambda: None,
) -> Counts:
    """Answers the lines with an engine of their own.

    Args:
        engine: settings of the engine.
        config: what of the server matters to requests.
        lines: of the input; empty ones are left out.
        write: takes each answer, a line, as soon as it is there; their order is another one.
        done: called after each.

    Raises:
        JaxserveError: the model can't be loaded, or the engine is dead for good.
    """
    process = EngineProcess(engine, warmup="full", step_timeout_s=config.step_timeout_s)
    return asyncio.run(_run(process, engine, config, lines, write, done))


async def _run(
    process: EngineProcess,
    engine: EngineConfig,
    config: ServerConfig,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    done: Callable[[], object],
) -> Counts:
    client = EngineClient(
        process, max_queue=config.max_queue, queue_timeout_s=config.queue_timeout_s
    )
    await client.start()
    failed = asyncio.create_task(client.failed())
    try:
        tokenizer = await asyncio.to_thread(load_tokenizer, engine, config)
        app = create_app(config, client, tokenizer, model_names(engine, config))
        work = asyncio.create_task(_answer_all(app, client, lines, write, done))
        await asyncio.wait({work, failed}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise EngineClosedError(failed.result())
        return work.result()
    finally:
        failed.cancel()
        await client.close()


async def _answer_all(
    app: web.Application,
    client: EngineClient,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    done: Callable[[], object],
) -> Counts:
    app.freeze()
    await app.startup()
    while client.info is None:
        await asyncio.sleep(POLL_S)
    # Enough that the engine's rows are never empty while text is made of the last tokens.
    room = asyncio.Semaphore(2 * client.info.max_num_seqs)
    counts = Counts()

    async def one(line: bytes) -> None:
        try:
            answer = await answer_line(app, line)
        finally:
            room.release()
        response = answer["response"]
        if response is not None and response["status_code"] == 200:
            counts.completed += 1
        else:
            counts.failed += 1
        write(orjson.dumps(answer) + b"\n")
        done()

    async with asyncio.TaskGroup() as tasks:
        for line in lines:
            if line.strip():
                await room.acquire()
                tasks.create_task(one(line))
    await app.cleanup()
    return counts


async def answer_line(app: web.Application, line: bytes) -> dict[str, Any]:
    """The answer to one line."""
    answer = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": None, "response": None}
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return answer | _refused(f"The line is no JSON: {error}.")
    if not isinstance(entry, dict) or not isinstance(entry.get("custom_id"), str):
        return answer | _refused('The line must be an object with a "custom_id".')
    answer["custom_id"] = entry["custom_id"]
    route = ROUTES.get(str(entry.get("url")))
    if route is None or entry.get("method") != "POST":
        return answer | _refused(f"method and url must be POST and one of {', '.join(ROUTES)}.")
    body = entry.get("body")
    if not isinstance(body, dict) or body.get("stream"):
        return answer | _refused("body must be an object, and must not ask for a stream.")
    request: Any = LocalRequest(app, orjson.dumps(body))
    try:
        reply: Any = await route(request)
    except Exception as error:  # what the server's middleware would do
        reply = api_error(error).response()
    content = orjson.loads(reply.body)
    response = {"status_code": reply.status, "body": content}
    response["request_id"] = content.get("id") or f"req_{uuid.uuid4().hex}"
    return answer | {"response": response, "error": None}


def _refused(message: str) -> dict[str, Any]:
    return {"error": {"code": "invalid_line", "message": message}}
