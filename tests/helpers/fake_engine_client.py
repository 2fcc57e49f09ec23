"""An engine for tests of the server: its tokens are a function of the prompt and the params."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from jaxserve.engine.request import TokenLogprobs
from jaxserve.sampling.params import SamplingParams
from server.engine_client import EngineDeadError, EngineInfo, OverloadedError, Startup
from server.engine_stream import EngineStream, TokenEvent

STORY = (
    "Once upon a time a small engine 🙂 read its prompts page by page, and wrote what came next. "
    "It never forgot a token, not even when the queue was long and the night was short. "
)
VOCAB = 2048
EOS = 2


class FakeEngineClient:
    """Looks like EngineClient. Each request's tokens are those of STORY, begun at a place that
    depends on the prompt, and on the seed unless it is greedy; one per ``step_s``.

    Args:
        story: token ids that are repeated for ever.
        capacity: requests that it takes at once.
        step_s: seconds per token.

    Attributes:
        live: requests under way, by id.
        submitted: (request id, prompt, params, cache salt, priority) of all so far.
        fail_after: tokens after which each request fails, if set.
        frozen: while it is set, nothing comes.
    """

    def __init__(self, story: list[int], capacity: int = 64, step_s: float = 0.0) -> None:
        self.info: EngineInfo | None = EngineInfo(2048, VOCAB, (EOS,), 8, "demo", "0", {})
        self.startup = Startup("ready", 1, 1, 0.0)
        self.state = "ready"
        self.silent_s = 0.0
        self.compiling = False
        self.live: dict[str, EngineStream] = {}
        self.submitted: list[tuple[str, list[int], SamplingParams, str, int]] = []
        self.fail_after: int | None = None
        self.queue_error: Exception | None = None
        self.frozen = False
        self.step_s = step_s
        self._story = story
        self._capacity = capacity
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def last_heartbeat(self) -> float:
        return time.monotonic() - self.silent_s

    def tokens(self, prompt: list[int], params: SamplingParams, count: int) -> list[int]:
        """What a request gets."""
        start = sum((i + 1) * token for i, token in enumerate(prompt))
        start += 0 if params.greedy else 7 * (params.seed or 0)
        ids = [self._story[(start + i) % len(self._story)] for i in range(count)]
        biased = max((params.logit_bias or {0: 0}).items(), key=lambda item: item[1])
        return [biased[0]] * count if biased[1] >= 100 else ids

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        interval: int = 1,
    ) -> EngineStream:
        if self.state != "ready" or self.info is None:
            raise EngineDeadError("The engine is dead.")
        limits = self.info.limits
        limits.check_prompt(prompt_token_ids)
        limits.check_params(params)
        if len(self.live) >= self._capacity:
            raise OverloadedError("The queue is full.", 2.5)
        assert request_id not in self.live
        self.submitted.append((request_id, prompt_token_ids, params, cache_salt, priority))
        stream = EngineStream(request_id, lambda: self._forget(request_id), interval)
        self.live[request_id] = stream
        task = asyncio.create_task(self._generate(stream, prompt_token_ids, params))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def embed(
        self, request_id: str, prompt_token_ids: list[int], pooling: str
    ) -> list[float]:
        if self.state != "ready":
            raise EngineDeadError("The engine is dead.")
        if self.queue_error is not None:
            raise self.queue_error
        await asyncio.sleep(0)
        return [0.6, -0.8] if pooling == "mean" else [1.0 / len(prompt_token_ids), 0.5]

    async def stats(self) -> dict[str, Any]:
        if self.state == "dead":
            raise EngineDeadError("The engine is dead.")
        return {
            **dict.fromkeys(("steps", "scheduled_tokens", "padded_tokens", "prompt_tokens"), 7),
            **dict.fromkeys(("cached_tokens", "generation_tokens", "kv_slots", "kv_tokens"), 3),
            **{name: len(self.live) for name in ("running", "kv_pages_used")},
            "waiting": 0,
            "kv_pages_total": 100,
            "preemptions": 2,
            "finished": {"stop": 1},
            "compilations": {"warmup": 4, "late": 0},
            "padding_waste": 0.25,
            "kv_waste": 0.5,
        }

    def _forget(self, request_id: str) -> None:
        self.live.pop(request_id, None)

    async def _generate(
        self, stream: EngineStream, prompt: list[int], params: SamplingParams
    ) -> None:
        assert self.info is not None
        room = self.info.max_model_len - len(prompt)
        count = min(room, params.max_tokens or room)
        for place, token in enumerate(self.tokens(prompt, params, count)):
            while True:
                await asyncio.sleep(self.step_s)
                if not self.frozen:
                    break
            if stream.request_id not in self.live:
                return
            if self.queue_error is not None:
                self._forget(stream.request_id)
                stream.fail(self.queue_error)
                return
            stops = token in (params.stop_token_ids or ()) and place >= params.min_tokens
            reason = "stop" if stops else "length" if place == count - 1 else None
            if self.fail_after is not None and place >= self.fail_after:
                stream.put(TokenEvent([], finish_reason="error", error="The device failed."))
                break
            if reason is not None:
                self._forget(stream.request_id)
            stream.put(
                TokenEvent(
                    [token],
                    None if params.logprobs is None else [next_logprobs(token, params.logprobs)],
                    reason,
                    token if stops else None,
                    0 if place == 0 else None,
                    prompt_logprobs=None
                    if params.prompt_logprobs is None or place > 0
                    else [next_logprobs(one, params.prompt_logprobs) for one in prompt[1:]],
                )
            )
            if reason is not None:
                return
        self._forget(stream.request_id)


def next_logprobs(token: int, count: int) -> TokenLogprobs:
    """The token as the second likeliest: -0.5 for its successor, -1.5 for itself, ..."""
    order = [(token + 1) % VOCAB, token, *((token + i) % VOCAB for i in range(2, 30))]
    top = tuple((one, -0.5 - rank) for rank, one in enumerate(order[:count]))
    return TokenLogprobs(token, -1.5, 2, top)
