"""Small engines for tests, and a way to drive them step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams
from jaxserve.engine.batch import Bucket
from jaxserve.engine.core import Engine
from jaxserve.engine.request import Request, TokenLogprobs

ROWS, STEP_TOKENS, PAGE_SIZE = 8, 48, 8


def small_llm(directory: Path, decode_shape: bool = True, **changes: Any) -> LLM:
    """An LLM without tokenizer that compiles what it needs when it needs it: one shape for any
    step, and if ``decode_shape`` one for steps that only decode."""
    settings = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "use_tqdm": False,
        "max_num_seqs": ROWS,
        "max_num_batched_tokens": STEP_TOKENS,
        "block_size": PAGE_SIZE,
    }
    llm = LLM(str(directory), **settings | changes)
    if decode_shape:  # what is compiled already is preferred to smaller shapes that aren't
        rows = llm.config.max_num_seqs
        llm._runner.programs.get(("forward", Bucket(rows, rows)))
    return llm


def greedy_params(max_tokens: int, **changes: Any) -> SamplingParams:
    """Greedy decoding of exactly so many tokens."""
    settings = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return SamplingParams(**settings | changes)


def tokens_of(llm: LLM, prompts: Sequence[Any], params: Any) -> list[list[int]]:
    """What ``generate`` gives, as token ids of each prompt's first completion."""
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@dataclass
class Job:
    """One request of a workload.

    Attributes:
        prompt, params: what is asked.
        arrival: the step before which it is added.
        abort: the step before which it is aborted; None if never.
    """

    prompt: list[int]
    params: SamplingParams
    arrival: int = 0
    abort: int | None = None
    request: Request | None = None
    logprobs: list[TokenLogprobs | None] | None = None

    @property
    def output(self) -> list[int]:
        """The tokens it got."""
        assert self.request is not None
        return self.request.output_token_ids


def drive(engine: Engine, jobs: Sequence[Job], max_steps: int = 20_000) -> Sequence[Job]:
    """Runs a workload to its end, checking the books after each step, and leaves no page in use."""
    left, step = sorted(enumerate(jobs), key=lambda item: item[1].arrival), 0
    names = {}
    while left or engine.has_unfinished_requests:
        while left and left[0][1].arrival <= step:
            index, job = left.pop(0)
            job.request, job.logprobs = engine.add(f"job-{index}", job.prompt, job.params), []
            names[job.request.request_id] = job
        for name, job in names.items():
            if job.abort == step:
                engine.abort(name)
        for update in engine.step():
            if update.token_id is not None:
                names[update.request.request_id].logprobs.append(update.logprobs)
        engine.scheduler.check_integrity()
        step += 1
        assert step < max_steps, "the workload doesn't end"
    allocator = engine.scheduler.allocator
    assert allocator.num_free == allocator.num_usable
    return jobs
