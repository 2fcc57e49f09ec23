"""Biases, allowed tokens and bad words through the engine: chunks, preemption, rows, neighbours.

The oracle is transformers' logits, edited in numpy, one token at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, InvalidRequestError, SamplingParams
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import Job, drive, greedy_params, small_llm, tokens_of
from tests.helpers.faulty_runner import FaultyRunner
from tests.helpers.hf import random_prompts
from tests.jaxserve.sampling.test_edits import edited_logits

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The fifth is longer than a step."""
    return [*random_prompts(4, VOCAB_SIZE, 1, (3, 40)), *random_prompts(1, VOCAB_SIZE, 2, (60, 61))]


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with small_llm(directory) as llm:
        yield llm


class Reference:
    """Greedy decoding by transformers whose logits are edited."""

    def __init__(self, directory: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

    def tokens(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        output: list[int] = []
        with self._torch.no_grad():
            for _ in range(params.max_tokens):
                ids = self._torch.tensor([[*prompt, *output]])
                logits = self._model(ids).logits[0, -1].numpy()
                output.append(int(edited_logits(logits, params, output).argmax()))
        return output


@pytest.fixture(scope="module")
def free(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return tokens_of(llm, prompts, greedy_params(MAX_TOKENS))


@pytest.fixture(scope="module")
def asked(free: list[list[int]]) -> list[SamplingParams]:
    """Edits that change each prompt's output: what it would be without them is what they name."""
    bad = [free[3][:1], free[3][1:3], free[3][:3], free[3][2:6]]
    return [
        greedy_params(MAX_TOKENS, logit_bias={free[0][0]: -100, free[0][1]: -5, 7: 2.5}),
        greedy_params(MAX_TOKENS, allowed_token_ids=sorted({*range(40), *free[1]} - {free[1][0]})),
        greedy_params(MAX_TOKENS, bad_words_token_ids=[free[2][1:3], free[2][4:7]]),
        greedy_params(MAX_TOKENS, bad_words_token_ids=bad),
        greedy_params(
            MAX_TOKENS,
            logit_bias=dict.fromkeys(range(0, VOCAB_SIZE, 2), -3.0),
            allowed_token_ids=list(range(VOCAB_SIZE // 2)),
            bad_words_token_ids=[[free[4][0]]],
        ),
    ]


@pytest.fixture(scope="module")
def wanted(
    directory: Path, prompts: list[list[int]], asked: list[SamplingParams], free: list[list[int]]
) -> list[list[int]]:
    reference = Reference(directory)
    wanted = [reference.tokens(prompt, params) for prompt, params in zip(prompts, asked)]
    assert all(one != two for one, two in zip(wanted, free)), "each must change something"
    return wanted


def test_edited_outputs_are_the_references(
    llm: LLM, prompts: list[list[int]], asked: list[SamplingParams], wanted: list[list[int]]
) -> None:
    """All in one batch."""
    assert tokens_of(llm, prompts, asked) == wanted


@pytest.mark.parametrize("which", range(5))
def test_neighbours_of_one_edited_request_notice_nothing(
    llm: LLM,
    prompts: list[list[int]],
    asked: list[SamplingParams],
    wanted: list[list[int]],
    free: list[list[int]],
    which: int,
) -> None:
    params = [greedy_params(MAX_TOKENS)] * 5
    params[which] = asked[which]
    outputs = tokens_of(llm, prompts, params)
    assert outputs == [*free[:which], wanted[which], *free[which + 1 :]]


def test_the_next_owners_of_the_rows_notice_nothing(
    llm: LLM,
    prompts: list[list[int]],
    asked: list[SamplingParams],
    wanted: list[list[int]],
    free: list[list[int]],
) -> None:
    """They share steps with an edited request, so that the sampler with edits runs."""
    tokens_of(llm, prompts, asked)
    jobs = [Job(prompt, greedy_params(MAX_TOKENS)) for prompt in prompts]
    edited = Job(prompts[0], asked[0])
    drive(llm._engine, [*jobs, edited])
    assert [job.output for job in jobs] == free
    assert edited.output == wanted[0]


def test_the_sampler_without_edits_runs_where_nobody_asks(
    directory: Path, prompts: list[list[int]], asked: list[SamplingParams]
) -> None:
    with small_llm(directory, decode_shape=False) as llm:
        tokens_of(llm, prompts[:1], greedy_params(2))
        assert not any(key[0] == "write_edits" for key in llm.programs._ready)
        assert not any(key[0] == "sample" for key in llm.programs._ready)
        tokens_of(llm, prompts[:1], asked[0])
        assert {key[2] for key in llm.programs._ready if key[0] == "sample"} == {"full"}


def test_requests_that_lose_their_pages_keep_their_edits(
    directory: Path, prompts: list[list[int]], asked: list[SamplingParams], wanted: list[list[int]]
) -> None:
    """Words that began before the preemption are still caught after it."""
    with small_llm(
        directory, decode_shape=False, max_model_len=80, num_gpu_blocks_override=11
    ) as llm:
        jobs = [Job(p, params) for p, params in zip(prompts, asked) for _ in range(3)]
        drive(llm._engine, jobs)
        assert llm.stats.preemptions > 3
        assert [job.output for job in jobs] == [tokens for tokens in wanted for _ in range(3)]


def test_a_failed_step_costs_no_edit_and_nothing_that_was_read_of_a_prompt(
    directory: Path, prompts: list[list[int]], asked: list[SamplingParams], wanted: list[list[int]]
) -> None:
    """The device forgets everything, once in the prompts and once in the outputs."""
    params = [one.replace(prompt_logprobs=1) for one in asked]
    with small_llm(directory, decode_shape=False) as llm:
        want = llm.generate(prompts, params, use_tqdm=False)
        faults = {2: "dispatch", 7: "collect"}
        llm._engine._runner = FaultyRunner(llm._engine._runner, faults.get, llm._engine.stats)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats.recoveries == 2
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    for output, other in zip(outputs, want, strict=True):
        for entries, others in zip(output.prompt_logprobs[1:], other.prompt_logprobs[1:]):
            assert [entry.rank for entry in entries.values()] == [
                entry.rank for entry in others.values()
            ]
            assert [entry.logprob for entry in entries.values()] == pytest.approx(
                [entry.logprob for entry in others.values()], abs=2e-5
            )


def test_sampled_requests_with_neutral_edits_draw_the_same(
    llm: LLM, prompts: list[list[int]]
) -> None:
    plain = SamplingParams(seed=5, max_tokens=MAX_TOKENS, ignore_eos=True, top_p=0.9)
    neutral = [
        plain.replace(logit_bias={3: 0.0}),
        plain.replace(allowed_token_ids=list(range(VOCAB_SIZE))),
        plain.replace(logprobs=3),
        plain.replace(bad_words_token_ids=[[0] * 16]),
        plain.replace(truncate_prompt_tokens=500),
    ]
    assert tokens_of(llm, prompts, neutral) == tokens_of(llm, prompts, plain)


def test_truncated_prompts_are_their_last_tokens(llm: LLM, prompts: list[list[int]]) -> None:
    params = greedy_params(4, truncate_prompt_tokens=3)
    (output,) = llm.generate([prompts[4]], params, use_tqdm=False)
    assert output.prompt_token_ids == prompts[4][-3:]
    assert [output.outputs[0].token_ids] == tokens_of(llm, [prompts[4][-3:]], greedy_params(4))


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1}}, "logit_bias"),
        ({"allowed_token_ids": [0, VOCAB_SIZE]}, "allowed_token_ids"),
        ({"bad_words_token_ids": [[1], [2, VOCAB_SIZE]]}, "bad_words_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),  # there is no tokenizer here
    ],
)
def test_what_the_model_cannot_know_is_refused(llm: LLM, settings: dict, param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        llm.generate([[5]], SamplingParams(**settings), use_tqdm=False)
    assert error.value.param == param
    assert not llm._engine.has_unfinished_requests


def test_a_request_that_may_choose_nothing_fails_alone(
    llm: LLM, prompts: list[list[int]], free: list[list[int]]
) -> None:
    nothing = greedy_params(MAX_TOKENS, allowed_token_ids=[9], bad_words_token_ids=[[9]])
    params = [greedy_params(MAX_TOKENS), nothing]
    one, two = llm.generate(prompts[:2], params, use_tqdm=False)
    assert one.outputs[0].token_ids == free[0]
    assert (two.outputs[0].token_ids, two.outputs[0].finish_reason) == ([], "error")


def test_priorities_are_one_per_prompt(llm: LLM, prompts: list[list[int]]) -> None:
    outputs = llm.generate(prompts[:2], greedy_params(2), priority=[3, -1], use_tqdm=False)
    assert np.all([output.finished for output in outputs])
    with pytest.raises(InvalidRequestError, match="1 priorities were given for 2 prompts"):
        llm.generate(prompts[:2], greedy_params(2), priority=[3], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="priority must be an integer"):
        llm.generate(prompts[:2], greedy_params(2), priority=[1, "high"], use_tqdm=False)
