"""Beam searches of requests: the search of ``jaxserve.beam_search`` on the engine's streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import islice

from jaxserve.beam_search import BeamSearch, BeamSearchSequence
from jaxserve.engine.request import TokenLogprobs
from jaxserve.errors import RequestFailedError
from jaxserve.outputs import Logprob
from server.completion import Completion, check
from server.engine_client import EngineStream, TokenEvent
from server.generation import Run
from server.protocol.sampling import Options
from server.service import Prompt, Service


def make_run(service: Service, request_id: str, prompts: Sequence[Prompt], options: Options) -> Run:
    """The completions that a request asks for, sampled or searched for."""
    kind = Run if options.beams is None else BeamRun
    return kind(service, request_id, prompts, options)


class BeamRun(Run):
    """The ``options.best_of`` likeliest completions of each prompt, best first.

    Nothing runs in the engine before ``finish``, which is the only way to get them. The search
    asks for one token of every beam at a time: each is a request of its own, to which the queue's
    bound and its timeout apply anew.
    """

    async def finish(self) -> None:
        """Searches.

        Raises:
            OverloadedError, EngineDeadError, InvalidRequestError: the engine refuses a beam.
            ApiError: a beam waited too long, or the server shuts down.
            RequestFailedError: the engine gave a beam up.
        """
        assert self.options.beams is not None
        info = self._service.info()
        search = BeamSearch(
            [prompt.token_ids for prompt in self.prompts],
            self.options.beams,
            info.max_model_len,
            info.eos_token_ids,
            self.options.params.logprobs or 0,
        )
        round_ = 0
        while asked := search.asked():
            events = await self._ask(search, asked, round_)
            if round_ == 0:
                self._begin(events)
            search.take([_likeliest(event) for event in events])
            round_ += 1
        width = self.options.best_of
        for at, output in enumerate(search.outputs()):
            for completion, sequence in zip(self.completions[at * width :], output.sequences):
                self._fill(completion, sequence)

    def best(self) -> list[Completion]:
        """The n likeliest completions of each prompt."""
        n, width = self.options.n, self.options.best_of
        starts = range(0, len(self.completions), width)
        return [one for start in starts for one in self.completions[start : start + n]]

    def _submit(self, number: int, prompt: Prompt) -> None:
        self._add(number, prompt, self.options.params)

    async def _ask(
        self, search: BeamSearch, asked: Sequence[tuple[int, list[int]]], round_: int
    ) -> list[TokenEvent]:
        """One more token of each of these sequences. Leaving it early aborts all of them."""
        self._service.info()  # says better than the engine's client why there is none
        async with AsyncExitStack() as stack:
            streams = []
            for number, (_, token_ids) in enumerate(asked):
                stream = self._service.engine.submit(
                    f"{self._request_id}-{round_}-{number}",
                    token_ids,
                    search.settings,
                    cache_salt=self.options.cache_salt,
                    priority=self.options.priority,
                )
                streams.append(await stack.enter_async_context(stream))
            return [await _only_event(stream) for stream in streams]

    def _begin(self, events: Sequence[TokenEvent]) -> None:
        """Notes what the first round tells, in which each prompt is a beam."""
        for completion in self.completions:
            event = events[completion.number // self.options.best_of]
            completion.num_cached_tokens = event.num_cached_tokens
            self._measure(completion, 0)

    def _fill(self, completion: Completion, sequence: BeamSearchSequence) -> None:
        token_ids = sequence.tokens[len(completion.prompt.token_ids) :]
        logprobs, shown = None, self.options.params.logprobs
        if shown is not None:
            pairs = zip(token_ids, sequence.logprobs)
            logprobs = [_of_token(token_id, entries, shown) for token_id, entries in pairs]
        # In two steps: the last token is no end token that would have to be left out of the text.
        delta = completion.take(TokenEvent(token_ids, logprobs))
        completion.take(TokenEvent([], finish_reason=sequence.finish_reason))
        self._measure(completion, len(delta.token_ids))


async def _only_event(stream: EngineStream) -> TokenEvent:
    """The event of a request for one token."""
    async for event in stream:
        return check(event)
    raise RequestFailedError("The engine ended the generation without a reason.")


def _likeliest(event: TokenEvent) -> dict[int, Logprob]:
    assert event.logprobs is not None, "the settings of a search ask for them"
    ranked = enumerate(event.logprobs[0].top, start=1)
    return {token_id: Logprob(logprob, rank, None) for rank, (token_id, logprob) in ranked}


def _of_token(token_id: int, entries: dict[int, Logprob], most: int) -> TokenLogprobs:
    """A token of a beam as the engine would have told it: with so many of the likeliest."""
    chosen = entries[token_id]
    top = tuple((other, entry.logprob) for other, entry in islice(entries.items(), most))
    return TokenLogprobs(token_id, chosen.logprob, chosen.rank, top)
