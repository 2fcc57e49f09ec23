"""Log-probabilities of prompts are transformers', however they were cut and whatever ran beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.engine.prompt_reads import MIN_PIECE
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint, reference_logits
from tests.helpers.engines import ROWS, STEP_TOKENS, Job, drive, greedy_params, small_llm, tokens_of
from tests.helpers.hf import random_prompts

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with small_llm(directory) as llm:
        yield llm


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def check(directory: Path, output: RequestOutput, wanted: int) -> None:
    """Every token's entries against transformers' logits of the position before."""
    ids = output.prompt_token_ids
    logprobs = log_softmax(reference_logits(directory, ids))
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(ids)
    assert output.prompt_logprobs[0] is None
    for at in range(1, len(ids)):
        entries, want = output.prompt_logprobs[at], logprobs[at - 1]
        assert entries is not None
        assert ids[at] in entries
        assert len(entries) in (wanted, wanted + 1)
        for token, entry in entries.items():
            assert abs(entry.logprob - want[token]) < TOLERANCE
            assert (want > want[token] + TOLERANCE).sum() < entry.rank
            assert (want >= want[token] - TOLERANCE).sum() >= entry.rank
        assert sorted(entry.rank for entry in entries.values())[:wanted] == list(
            range(1, wanted + 1)
        )


@pytest.mark.parametrize("case", ["llama-gqa", "qwen3", "opt-350m", "opt-untied"])
@pytest.mark.parametrize("wanted", [0, 3])
def test_they_are_those_of_transformers(case: str, wanted: int, tmp_path: Path) -> None:
    """Prompts of one token, of several steps, and all together."""
    directory = make_checkpoint(tmp_path, case)
    prompts = [[7], [8, 9], *random_prompts(3, VOCAB_SIZE, 1, (20, 120))]
    with small_llm(directory, decode_shape=False) as llm:
        outputs = llm.generate(
            prompts, greedy_params(2, prompt_logprobs=wanted, logprobs=1), use_tqdm=False
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        check(directory, output, wanted)


def test_who_does_not_ask_gets_none_and_the_same_tokens(llm: LLM, directory: Path) -> None:
    prompts = random_prompts(5, VOCAB_SIZE, 2, (1, 100))
    alone = tokens_of(llm, prompts, greedy_params(10))
    params = [greedy_params(10)] * 5
    params[3] = greedy_params(10, prompt_logprobs=2)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert [output.prompt_logprobs is None for output in outputs] == [True, True, True, False, True]
    check(directory, outputs[3], 2)


def test_they_read_nothing_from_the_prefix_cache_but_others_may_read_theirs(llm: LLM) -> None:
    (prompt,) = random_prompts(1, VOCAB_SIZE, 3, (50, 51))
    asking, plain = greedy_params(2, prompt_logprobs=1), greedy_params(2)
    cached = [
        llm.generate([prompt], params, use_tqdm=False)[0].num_cached_tokens
        for params in (asking, asking, plain)
    ]
    assert cached == [0, 0, 48]


def test_one_of_several_completions_reads_the_prompt(llm: LLM, directory: Path) -> None:
    (prompt,) = random_prompts(1, VOCAB_SIZE, 4, (50, 51))
    params = SamplingParams(n=3, seed=1, max_tokens=3, prompt_logprobs=1)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert len(output.outputs) == 3
    check(directory, output, 1)


def test_requests_that_lose_their_pages_lose_no_logprobs(directory: Path) -> None:
    """The prompts are long enough to be preempted between their chunks."""
    prompts = random_prompts(6, VOCAB_SIZE, 5, (30, 70))
    params = greedy_params(14, prompt_logprobs=1)
    with small_llm(
        directory,
        decode_shape=False,
        max_model_len=88,
        num_gpu_blocks_override=14,
        max_num_batched_tokens=16,
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats.preemptions > 0
    for output in outputs:
        check(directory, output, 1)


def test_its_programs_are_compiled_once_and_for_whoever_asks(directory: Path) -> None:
    prompts = random_prompts(3, VOCAB_SIZE, 6, (1, 120))
    with small_llm(directory) as llm:
        drive(llm._engine, [Job(prompt, greedy_params(4)) for prompt in prompts])
        assert not {("forward_with_hidden",), ("score_prompt",)} & llm.programs._ready.keys()
        tokens_of(llm, prompts, greedy_params(4, prompt_logprobs=1))
        compiled = dict(llm.stats.compilations)
        assert {("forward_with_hidden",), ("score_prompt",)} <= llm.programs._ready.keys()
        tokens_of(llm, prompts[::-1], greedy_params(6, prompt_logprobs=20))
        assert llm.stats.compilations == compiled


def test_logits_are_made_of_a_bounded_number_of_tokens_at_a_time(llm: LLM) -> None:
    tokens_of(llm, [[5, 6, 7]], greedy_params(1, prompt_logprobs=1))
    program = llm.programs._ready["score_prompt",]
    (shape, *_) = (aval.shape for aval in program.in_avals[0][2:])
    assert shape == (2, max(MIN_PIECE, ROWS))
    assert STEP_TOKENS < MIN_PIECE
