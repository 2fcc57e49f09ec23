"""LLM: generation in a notebook or a script."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from converters import open_checkpoint
from jaxserve import build, compat, log
from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from jaxserve.chat_templates import text_of
from jaxserve.config import EngineConfig
from jaxserve.engine.core import Engine
from jaxserve.engine.programs import Programs
from jaxserve.engine.request import FinishReason, Pooling, Request
from jaxserve.engine.stats import Stats
from jaxserve.engine.timeline import Timeline
from jaxserve.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
)
from jaxserve.generations import Generations, OnText, clear
from jaxserve.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from jaxserve.prompts import Prompt, as_list, parse, priorities
from jaxserve.sampling.params import SamplingParams
from jaxserve.tokenizer import Tokenizer

Message = dict[str, Any]
Warmup = str


class LLM:
    """A model that generates text.

        with LLM("Qwen/Qwen3-0.6B") as llm:
            print(llm.generate("Hello, my name is")[0].outputs[0].text)

    ``LLM()`` alone loads the embedded demo model, a toy. The keyword arguments are the fields of
    EngineConfig, which bear vLLM's names; vLLM's other arguments are accepted where they need
    nothing here.

    Args:
        model: a checkpoint directory (Hugging Face or Orbax) or a hub id.
        chat_template: replaces the tokenizer's: a Jinja text or file, or the name of a built-in
            one ("vicuna", "llama-2", "llama-3", "chatml", "qwen").
        warmup: "full" compiles every program before the constructor returns; "background" returns
            once some request can be served and compiles the rest meanwhile.
        use_tqdm: show progress while loading and compiling.
        **arguments: see EngineConfig.

    Attributes:
        config: with every size filled in.
        model_config: of the checkpoint.
        dtype: name of the weights' dtype.
        memory: where a device's memory goes.
        timeline: the stages of its start.

    Raises:
        ConfigError: an argument is wrong, or doesn't fit the model or the machine.
        CheckpointError: the checkpoint can't be read.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        chat_template: str | None = None,
        warmup: Warmup = "full",
        use_tqdm: bool = True,
        **arguments: Any,
    ) -> None:
        log.set_up()
        self._engine: Engine | None = None
        if warmup not in ("full", "background"):
            raise ConfigError(f'warmup={warmup!r} must be "full" or "background".')
        config = compat.engine_config(model and str(model), arguments)
        if config.skip_tokenizer_init and chat_template is not None:
            raise ConfigError("chat_template needs a tokenizer; drop skip_tokenizer_init.")
        self.timeline = Timeline()
        path = build.find_model(config)
        self._checkpoint = open_checkpoint(path, config.load_format)
        self._num_requests = 0
        tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-tokenizer")
        with build.rare_garbage_collection(), tokenizer_thread as thread:
            # While the device starts, which takes seconds, and the first programs are compiled.
            where = config.tokenizer or str(path)
            tokenizer = thread.submit(self._load_tokenizer, config, where, chat_template)
            built = build.build(config, self._checkpoint, self.timeline)
            self.config, self.memory = built.config, built.memory
            self._runner, self._engine = built.runner, built.engine
            self.model_config, self.dtype = self._checkpoint.config, built.dtype.name
            try:
                build.start_compiling(built, everything=warmup == "full")
                self._tokenizer = tokenizer.result()
                self._start(built, warmup == "full", use_tqdm)
            except BaseException:
                self.close()
                raise

    def _load_tokenizer(
        self, config: EngineConfig, where: str, chat_template: str | None
    ) -> Tokenizer | None:
        if config.skip_tokenizer_init:
            return None
        with self.timeline.stage("tokenizer"):
            template = None if chat_template is None else text_of(chat_template)
            return Tokenizer(where, config.tokenizer_revision, template)

    def _start(self, built: build.Built, wait_for_all: bool, use_tqdm: bool) -> None:
        """Loads the weights while programs are compiled, and waits for them."""
        stage = self.timeline.stage
        with stage("weights"):
            build.load_weights(built, use_tqdm)
        if not built.config.enforce_eager:
            with stage("waiting for programs"):
                build.warm_up(built, wait_for_all, use_tqdm)
        with stage("allocating"):
            build.allocate(built)

    # --- generating -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; returns one output per prompt, in their order.

        Among prompts of one priority, those with the largest max_tokens get their turn first: with
        the longest at the end, the last steps would have few rows.

        Args:
            prompts: texts, lists of token ids, or dicts with "prompt" or "prompt_token_ids", and
                optionally "cache_salt".
            sampling_params: for all, or one per prompt; the model's own defaults if None.
            use_tqdm: show progress.
            priority: of each prompt; lower ones get their turn first. 0 for all by default.
            on_text: called with an output and its first completion's new text as it comes.

        Raises:
            InvalidRequestError: a prompt can't be served; the others are given up then.
        """
        engine = self._running_engine()
        items = as_list(prompts)
        params = self._params_for(sampling_params, len(items))
        ranks = priorities(priority, len(items))
        for rank in ranks:
            engine.limits.check_priority(rank)
        names = [self._next_name() for _ in items]
        requests = list(zip(names, items, params, ranks))
        most = engine.max_model_len
        requests.sort(key=lambda request: (request[3], -(request[2].max_tokens or most)))
        generations = Generations(engine, self._tokenizer, on_text)
        try:
            outputs = {request[0]: generations.add(*request) for request in requests}
            generations.run(use_tqdm)
        finally:
            generations.clear()
        return [outputs[name] for name in names]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Searches for the likeliest continuations of each prompt; see BeamSearchParams.

        Raises:
            InvalidRequestError: a prompt can't be served.
        """
        engine = self._running_engine()

        def generate(beams: list[Any], settings: SamplingParams) -> list[RequestOutput]:
            return self.generate(beams, settings, use_tqdm=use_tqdm)

        parsed = [parse(prompt, self._tokenizer)[1:] for prompt in as_list(prompts)]
        limit, ends = engine.max_model_len, engine.eos_token_ids
        outputs = beam_search(parsed, params, generate, limit, ends)
        if self._tokenizer is not None:
            for sequence in (sequence for output in outputs for sequence in output.sequences):
                sequence.text = self._tokenizer.decode(sequence.tokens)
        return outputs

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "last"
    ) -> list[EmbeddingRequestOutput]:
        """Vectors of length 1 for prompts, in their order.

        They are made of the model's final hidden states, whatever decoder it is; one that was
        trained for embeddings gives better ones. The first call waits until the programs for it are
        compiled.

        Args:
            prompts: as for ``generate``.
            pooling: "last" takes the last token's state, "mean" the mean of all tokens'.

        Raises:
            InvalidRequestError: a prompt can't be served.
            RequestFailedError: a prompt's hidden states are no numbers.
        """
        engine = self._running_engine()
        requests: dict[str, Request] = {}
        vectors: dict[str, list[float]] = {}
        try:
            for prompt in as_list(prompts):
                _, ids, salt = parse(prompt, self._tokenizer)
                request_id = self._next_name()
                requests[request_id] = engine.embed(request_id, ids, pooling, salt)
            while len(vectors) < len(requests):
                for update in engine.step():
                    if update.finish_reason is FinishReason.ERROR:
                        raise RequestFailedError("The model gave numbers that are none.")
                    vectors[update.request.request_id] = update.embedding.tolist()
        finally:
            clear(engine, requests)
        return [
            EmbeddingRequestOutput(
                name,
                EmbeddingOutput(vectors[name]),
                request.token_ids,
                request.num_cached_tokens or 0,
            )
            for name, request in requests.items()
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, each a list of {"role", "content"} messages.

        Args:
            add_generation_prompt: begin the assistant's turn.
            continue_final_message: go on with the last message instead.
            tools: schemas of functions, for templates that show them to the model.
            chat_template: replaces the tokenizer's for this call.
            chat_template_kwargs: more variables for the template.

        Raises:
            InvalidRequestError: the template refuses the messages, or a prompt can't be served.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer; drop skip_tokenizer_init.")
        if not messages or isinstance(messages, str):
            raise InvalidRequestError("messages must be a list of messages.", "messages")
        one = isinstance(messages[0], dict)
        conversations: Any = [messages] if one else messages
        options = dict(chat_template_kwargs or {})
        if chat_template is not None:
            options["chat_template"] = chat_template
        prompts: list[Prompt] = []
        for conversation in conversations:
            text, ids = self._tokenizer.chat(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **options,
            )
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_text=on_text)

    def get_tokenizer(self) -> Any:
        """The tokenizer of ``transformers``, or None with skip_tokenizer_init."""
        return self._tokenizer and self._tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults of the model's generation_config.json."""
        fields = {field.name for field in dataclasses.fields(SamplingParams)}
        given = self._checkpoint.generation
        return SamplingParams(**{name: given[name] for name in fields & given.keys()})

    @property
    def stats(self) -> Stats:
        """The engine's counters."""
        return self._running_engine().stats

    @property
    def programs(self) -> Programs:
        """The compiled programs."""
        self._running_engine()
        return self._runner.programs

    # --- end of life ----------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the device memory. Safe to call twice; ``with LLM(...)`` and ``del`` call it."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
            del self._runner

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()

    # --- inside ---------------------------------------------------------------------------------

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise EngineClosedError("this LLM was closed; make a new one")
        return self._engine

    def _params_for(self, params: Any, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            message = f"{len(params)} sampling_params were given for {count} prompts."
            raise InvalidRequestError(message, "sampling_params")
        return list(params)

    def _next_name(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)
