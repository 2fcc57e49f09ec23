"""Service: what the routes share, and the checks that need the engine's sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web

from jaxserve.errors import InvalidRequestError
from jaxserve.log import logger
from server.config import ServerConfig
from server.engine_client import EngineClient, EngineInfo
from server.errors import context_length_exceeded, model_not_found, unavailable
from server.metrics import Metrics
from server.protocol.chat import Conversation
from server.protocol.completions import Prompt as WirePrompt
from server.protocol.sampling import Options
from server.texts import Texts

Result = TypeVar("Result")
HEARTBEAT_TIMEOUT_S = 5.0
FEW_TOKENS = 2**14
"""To look at so many takes half a millisecond."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that the engine can take; ``text`` as it came, None if it came as token ids."""

    token_ids: list[int]
    text: str | None


@dataclass
class Service:
    """One front-end.

    Attributes:
        names: of the model; the first stands in replies.
        started: Unix time.
        under_way: generating requests.
    """

    config: ServerConfig
    engine: EngineClient
    texts: Texts
    names: tuple[str, ...]
    metrics: Metrics
    started: int
    under_way: int = 0

    # --- the engine -----------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the engine runs and its loop was heard of lately. Costs nothing."""
        fresh = time.monotonic() - self.engine.last_heartbeat < HEARTBEAT_TIMEOUT_S
        return self.engine.state in ("ready", "draining") and fresh

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of SamplingParams, from the model's generation_config.json."""
        return self.engine.info.default_sampling_params if self.engine.info else {}

    def info(self) -> EngineInfo:
        """The engine's sizes.

        Raises:
            ApiError: it doesn't serve (yet, or any more).
        """
        state, info = self.engine.state, self.engine.info
        if state == "ready" and info is not None:
            return info
        if state == "starting":
            message = f"The model is being loaded ({self.engine.startup.stage}); see /startup."
            raise unavailable(message, "starting", self.engine.startup.eta_s or 5)
        if state in ("draining", "closed"):
            raise unavailable("The server is shutting down.", "shutting_down")
        raise unavailable("The engine is not running.", "engine_dead")

    def log_request(self, request_id: str, prompts: Sequence[Prompt], options: Options) -> None:
        """Logs what a request asks for, if the server was started with --enable-log-requests."""
        if not self.config.enable_log_requests:
            return
        for prompt in prompts:
            most = self.config.max_log_len
            shown = prompt.token_ids[:most] if prompt.text is None else prompt.text[:most]
            settings = options.beams or options.params
            logger.info("request %s: prompt %r, %s", request_id, shown, settings)

    # --- what requests name ---------------------------------------------------------------------

    def model(self, name: str | None) -> str:
        """The model's name for a reply, if ``name`` is one of its names.

        Raises:
            ApiError: it isn't.
        """
        if name is not None and name not in self.names:
            raise model_not_found(name)
        return self.names[0] if name is None else name

    async def prompts(
        self, items: Sequence[WirePrompt], add_special_tokens: bool, options: Options
    ) -> list[Prompt]:
        """Texts or token ids as prompts that the engine can take.

        Raises:
            ApiError: one doesn't fit into the context, or would not with ``options.max_tokens``.
            InvalidRequestError: one has no tokens, or the vocabulary lacks one.
            OverloadedError: too many texts wait to be tokenized.
        """
        token_ids = await self.token_ids(items, add_special_tokens, "prompt")

        def work() -> list[Prompt]:
            return [
                Prompt(self.admit(ids, options, "prompt"), item if isinstance(item, str) else None)
                for item, ids in zip(items, token_ids)
            ]

        return await self.off_loop(work, sum(map(len, token_ids)))

    async def off_loop(self, work: Callable[[], Result], num_tokens: int) -> Result:
        """Does something with tokens, in a thread if there are many. Raises what ``work`` raises,
        and OverloadedError if too much waits."""
        return work() if num_tokens <= FEW_TOKENS else await self.texts.run(work)

    async def token_ids(
        self, items: Sequence[WirePrompt], add_special_tokens: bool, param: str
    ) -> list[list[int]]:
        """Texts as token ids; token ids as they are. Raises what ``Texts.encode`` raises."""
        most = self.info().max_model_len
        texts = [item for item in items if isinstance(item, str)]
        if not texts:
            return [item for item in items if not isinstance(item, str)]
        return await self.texts.encode(texts, add_special_tokens, most, param)

    async def conversation(self, conversation: Conversation, options: Options) -> Prompt:
        """A conversation as a prompt. Raises what ``prompts`` raises, and if the template
        refuses."""
        ids = await self.texts.render(conversation, self.info().max_model_len)
        return Prompt(self.admit(ids, options, "messages"), None)

    def admit(self, ids: list[int], options: Options, param: str) -> list[int]:
        """A prompt's token ids, cut off if wished. Raises what ``prompts`` raises."""
        info, params = self.info(), options.params
        ids = params.truncated(ids, info.max_model_len)
        if not ids:
            raise InvalidRequestError(f"{param} has no tokens; give at least one.", param)
        if len(ids) >= info.max_model_len:
            raise context_length_exceeded(
                f"Input length of {param} ({len(ids)}) exceeds the model's maximum context length "
                f"({info.max_model_len}), of which one token must be left for the output. "
                "Shorten it.",
                param,
            )
        if len(ids) + (options.max_tokens or 0) > info.max_model_len:
            raise context_length_exceeded(
                f"{param} has {len(ids)} tokens and max_tokens is {options.max_tokens}, together "
                f"more than the context of {info.max_model_len} tokens. Lower max_tokens or leave "
                "it out.",
                "max_tokens",
            )
        info.limits.check_token_ids(param, ids)
        info.limits.check_params(params)
        return ids


SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
