"""The completions of one call of ``LLM.generate``: from prompts to outputs, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tqdm.auto import tqdm

from jaxserve.engine.core import Engine
from jaxserve.engine.request import FinishReason, RequestUpdate
from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import Generation, RequestOutput, completion_params
from jaxserve.prompts import Prompt, parse
from jaxserve.sampling.params import SamplingParams
from jaxserve.tokenizer import Tokenizer

OnText = Callable[[RequestOutput, str], None]


class Generations:
    """Completions that the engine works on.

    Args:
        engine: which nobody else steps meanwhile.
        tokenizer: None gives token ids only.
        on_text: called with an output and its first completion's new text as it comes.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, on_text: OnText | None) -> None:
        self._engine, self._tokenizer, self._on_text = engine, tokenizer, on_text
        self._under_way: dict[str, tuple[Generation, RequestOutput]] = {}
        self._num_tokens = 0
        self._num_waiting_tokens = 0

    def add(
        self, name: str, prompt: Prompt, params: SamplingParams, priority: int
    ) -> RequestOutput:
        """Admits a prompt's n completions; returns the output that grows. Where enough were added
        to fill a step, it begins while the next ones are checked.

        Raises:
            InvalidRequestError: it can't be served.
        """
        engine, tokenizer = self._engine, self._tokenizer
        text, ids, salt = parse(prompt, tokenizer)
        if tokenizer is None and params.stop:
            raise InvalidRequestError("stop strings need a tokenizer; use stop_token_ids.", "stop")
        if tokenizer is not None and params.bad_words:
            sequences = tokenizer.bad_words(params.bad_words)
            own = params.bad_words_token_ids or ()
            params = params.replace(bad_words_token_ids=[*own, *sequences])
        ids = params.truncated(ids, engine.max_model_len)
        output = RequestOutput(name, text, ids, [])
        for index in range(params.n):
            request_id = f"{name}-{index}"
            one = completion_params(params, index)
            if index > 0:
                one = one.replace(prompt_logprobs=None)  # all have the same prompt
            engine.add(request_id, ids, one, salt, priority)
            generation = Generation(params, ids, index, tokenizer, engine.eos_token_ids)
            output.outputs.append(generation.output)
            self._under_way[request_id] = generation, output
            self._num_waiting_tokens += len(ids)
        if self._num_waiting_tokens >= engine.max_step_tokens:
            self._num_waiting_tokens = 0
            engine.start_ahead()
        return output

    def run(self, use_tqdm: bool) -> None:
        """Steps the engine until every completion has ended; shows progress if there are several.
        Raises what ``Engine.step`` raises."""
        left = len(self._under_way)
        bar = tqdm(total=left, desc="Generating", unit="req", disable=not use_tqdm or left == 1)
        with bar:
            while left:
                for update in self._engine.step():
                    if self._take(update):
                        left -= 1
                        rate = self._num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                        bar.update()

    def clear(self) -> None:
        """Ends what an error or Ctrl-C may have left."""
        clear(self._engine, self._under_way)

    def _take(self, update: RequestUpdate) -> bool:
        """Adds what a step brought for a completion; returns whether that ended it."""
        request_id = update.request.request_id
        generation, output = self._under_way[request_id]
        if generation.output.finished():
            return False  # a stop string ended it; these are surplus tokens
        text = ""
        if update.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *map(generation.shown, update.prompt_logprobs)]
        if update.token_id is not None:
            self._num_tokens += 1
            stops = update.finish_reason is FinishReason.STOP
            text = generation.append(update.token_id, update.logprobs, stops)
        if generation.output.finished():
            self._engine.abort(request_id, FinishReason.STOP)
        elif update.finish_reason is not None:
            text += generation.finish(update.finish_reason, update.request.stop_reason)
        if self._on_text is not None and generation.output.index == 0:
            self._on_text(output, text)
        if not generation.output.finished():
            return False
        output.num_cached_tokens = update.request.num_cached_tokens
        output.finished = all(one.finished() for one in output.outputs)
        return True


def clear(engine: Engine, request_ids: Iterable[str]) -> None:
    """Ends what an error or Ctrl-C may have left of a call, and waits until its steps are over."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_unfinished_requests:
        engine.step()
