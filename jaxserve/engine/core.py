"""Engine: admits requests and carries out one step after the other, ahead of the device.

add → scheduler.schedule → runner.dispatch → (one step later) runner.collect → scheduler.update

A step that fails on the device takes the KV pages with it, since they are donated to each step. But
requests hold their tokens and the keys of their random numbers, so everything can be computed anew
and the same tokens come out.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from jaxserve import log
from jaxserve.engine.admission import Limits
from jaxserve.engine.decision import Decision, StepResult
from jaxserve.engine.request import FinishReason, Pooling, Request, RequestUpdate
from jaxserve.engine.scheduler import Scheduler
from jaxserve.errors import ConfigError, EngineClosedError, InvalidRequestError
from jaxserve.sampling.params import SamplingParams


class Runner(Protocol):
    """Computes steps. ``dispatch`` only starts one; ``collect`` waits for it."""

    def dispatch(self, decision: Decision) -> Any:
        """Starts a step; returns a handle for ``collect``."""

    def collect(self, handle: Any) -> StepResult:
        """Waits for a dispatched step; what it chose."""

    def allocate(self) -> None:
        """Makes the device state anew, empty; steps under way are never collected."""

    def close(self) -> None:
        """Frees what the runner holds."""


class Engine:
    """One model, its scheduler and its runner.

    Args:
        scheduler, runner: the two halves.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: width of the logits; prompt ids must lie below it.
        eos_token_ids: the model's own end tokens.
        dynamic_rope_len: prompts longer than this share no prefixes with prompts of other lengths,
            since their keys depend on the length (see ``rope.cos_sin``); None if never.
        seed: mixed into the seeds of requests that bring none.
        run_ahead: steps that are started before the results of an earlier one are waited for. One
            hides the host's work between steps; two also hide the launching of a step, which takes
            about as long as a small model's step on a GPU. Each costs a request that ends one
            surplus token.
        max_failures: so many failed steps with no token between them are an error for the owner;
            fewer are recovered from.

    Raises:
        ConfigError: the pages can't hold one sequence of ``max_model_len`` tokens, so a request
            could come to a halt for ever.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        dynamic_rope_len: int | None = None,
        seed: int = 0,
        run_ahead: int = 1,
        max_failures: int = 3,
    ) -> None:
        allocator = scheduler.allocator
        needed = scheduler.tables.most_pages(max_model_len)
        if needed > allocator.num_usable:
            raise ConfigError(
                f"max_model_len={max_model_len} needs {needed} KV pages of {allocator.page_size} "
                f"tokens, but there are {allocator.num_usable}. Lower it, or give the cache more "
                "memory."
            )
        self.scheduler = scheduler
        self.stats = scheduler.stats
        self.limits = Limits(max_model_len, vocab_size)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._dynamic_rope_len = dynamic_rope_len
        self._seed = seed
        self._num_added = 0
        self._runner: Runner | None = runner
        self._in_flight: deque[tuple[Decision, Any]] = deque()
        self._run_ahead = run_ahead
        self._max_failures = max_failures
        self._num_failures = 0

    @property
    def max_step_tokens(self) -> int:
        """Most tokens that a step computes."""
        return self.scheduler.max_step_tokens

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` still has something to do."""
        return bool(self.scheduler.requests or self._in_flight)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Request:
        """Admits one generation (``params.n`` is the caller's business).

        Args:
            priority: requests with lower numbers get their turn first and lose it last.

        Raises:
            InvalidRequestError: it could not be served, now or ever; says why.
            EngineClosedError: the engine was closed.
        """
        return self._admit(request_id, prompt_token_ids, params, cache_salt, priority, None)

    def embed(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        pooling: Pooling = "last",
        cache_salt: str = "",
        priority: int = 0,
    ) -> Request:
        """Admits a request for a prompt's embedding, which its only update will bring: the final
        hidden state of the last token, or the mean of all, scaled to length 1.

        Raises:
            InvalidRequestError, EngineClosedError: as ``add``.
        """
        if pooling not in ("last", "mean"):
            raise InvalidRequestError(f'pooling={pooling!r} must be "last" or "mean".', "pooling")
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        return self._admit(request_id, prompt_token_ids, params, cache_salt, priority, pooling)

    def _admit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        cache_salt: str,
        priority: int,
        pooling: Pooling | None,
    ) -> Request:
        if self._runner is None:
            raise EngineClosedError("this engine was closed; make a new one")
        if request_id in self.scheduler.requests:
            message = f"request_id {request_id!r} is already running."
            raise InvalidRequestError(message, param="request_id")
        prompt = list(prompt_token_ids)
        self.limits.check_prompt(prompt)
        self.limits.check_params(params)
        self.limits.check_priority(priority)
        room = self.max_model_len - len(prompt)
        seed = params.seed
        if seed is None:
            text = b"%d/%d" % (self._seed, self._num_added)
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
        self._num_added += 1
        stop = frozenset(params.stop_token_ids or ())
        request = Request(
            request_id=request_id,
            token_ids=prompt,
            params=params,
            max_tokens=min(room, params.max_tokens or room),
            stop_token_ids=stop if params.ignore_eos else stop | frozenset(self.eos_token_ids),
            seed=seed & (2**64 - 1),
            cache_salt=self._salt(cache_salt, len(prompt)),
            priority=priority,
            pooling=pooling,
        )
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a request at once; does nothing if it ended already."""
        self.scheduler.abort(request_id, reason)

    def start_ahead(self) -> None:
        """Starts a step if it needn't wait for an earlier one: for callers with more to add, who
        would let the devices idle meanwhile.

        Raises:
            Exception: as ``step``.
        """
        runner = self._runner
        if runner is None or len(self._in_flight) >= self._run_ahead:
            return
        decision = self.scheduler.schedule()
        if decision.requests:
            try:
                self._in_flight.append((decision, runner.dispatch(decision)))
            except Exception as error:
                self._recover(runner, error)

    def step(self) -> list[RequestUpdate]:
        """Starts the next step, then waits for the one ``run_ahead`` steps before it.

        Returns:
            The news of that earlier step; empty while the first steps run, and after a failure.

        Raises:
            Exception: what the runner raised, if that is the ``max_failures``-th time in a row.
                The requests are still there and the next step begins them anew.
        """
        runner = self._runner
        if runner is None:
            raise EngineClosedError("this engine was closed; make a new one")
        decision = self.scheduler.schedule()
        if not decision.requests and not self._in_flight:
            if self.scheduler.requests:
                raise RuntimeError("no request can be scheduled and none is running")
            return []
        try:
            if decision.requests:
                self._in_flight.append((decision, runner.dispatch(decision)))
                if len(self._in_flight) <= self._run_ahead:
                    return []
            finished, handle = self._in_flight.popleft()
            result = runner.collect(handle)
        except Exception as error:
            self._recover(runner, error)
            return []
        updates = self.scheduler.update(finished, result)
        if updates:
            self._num_failures = 0
        return updates

    def _recover(self, runner: Runner, error: Exception) -> None:
        """After a failed step: new device state, and all that ran waits with the tokens it has."""
        self._in_flight.clear()
        self.scheduler.restart()
        runner.allocate()
        self._num_failures += 1
        if self._num_failures >= self._max_failures:
            self._num_failures = 0
            raise error
        self.stats.recoveries += 1
        log.logger.warning("a step failed; all requests are computed anew.", exc_info=error)

    def close(self) -> None:
        """Aborts all requests and frees the device's memory. Safe to call twice."""
        for request_id in list(self.scheduler.requests):
            self.scheduler.abort(request_id)
        self._in_flight.clear()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _salt(self, cache_salt: str, prompt_len: int) -> bytes:
        """Hashed, so that no salt can be made to look like a page's hash, or like another salt."""
        dynamic = self._dynamic_rope_len is not None and prompt_len > self._dynamic_rope_len
        text = ascii((cache_salt, prompt_len if dynamic else None))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
