"""Whatever else happens in the engine, a request's tokens are those it would get alone."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import (
    LLM,
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
)
from jaxserve.engine.request import FinishReason
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import Job, drive, greedy_params, small_llm, tokens_of
from tests.helpers.hf import greedy, random_prompts

MAX_TOKENS = 24
LENGTHS = (1, 61)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """200 prompts; some begin alike for longer than a page, some are equal."""
    rng = np.random.default_rng(3)
    prompts = random_prompts(200, VOCAB_SIZE, 3, LENGTHS, distinct=8)
    for index in range(0, 200, 4):
        other = prompts[rng.integers(200)]
        shared = min(len(other), len(prompts[index]))
        prompts[index] = other[:shared] + prompts[index][shared:]
    return prompts


@pytest.fixture(scope="module")
def naive(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt gives alone."""
    return greedy(directory, prompts, MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with small_llm(directory) as llm:
        yield llm


def workload(prompts: list[list[int]], seed: int) -> list[Job]:
    """Greedy requests of random lengths and arrivals, every seventh aborted after a while."""
    rng = np.random.default_rng(seed)
    jobs = []
    for index, prompt in enumerate(prompts):
        arrival = int(rng.integers(0, 2 * len(prompts)))
        abort = arrival + int(rng.integers(0, 20)) if index % 7 == 0 else None
        params = greedy_params(int(rng.integers(1, MAX_TOKENS + 1)))
        jobs.append(Job(prompt, params, arrival, abort))
    return jobs


def check_naive(jobs: list[Job], naive: list[list[int]]) -> None:
    """All outputs are the naive ones; those of aborted requests, as far as they got."""
    for job, tokens in zip(jobs, naive, strict=True):
        if job.abort is None:
            assert job.request.finish_reason is FinishReason.LENGTH
            assert job.output == tokens[: job.params.max_tokens]
        else:
            assert job.output == tokens[: len(job.output)]


# --- greedy ---------------------------------------------------------------------------------------


def test_200_requests_at_random_times_get_the_naive_tokens(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    cached = llm.stats.cached_tokens
    jobs = drive(llm._engine, workload(prompts, seed=1))
    check_naive(jobs, naive)
    assert llm.stats.cached_tokens > cached
    reasons = [job.request.finish_reason for job in jobs]
    assert 0 < reasons.count(FinishReason.ABORT) < 40


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_so_small_that_requests_lose_their_pages(
    directory: Path, prompts: list[list[int]], naive: list[list[int]], prefix_caching: bool
) -> None:
    """One page per eight tokens: eleven pages hold one longest sequence and little more."""
    with small_llm(
        directory,
        decode_shape=False,
        max_model_len=88,
        num_gpu_blocks_override=14,
        enable_prefix_caching=prefix_caching,
    ) as llm:
        check_naive(drive(llm._engine, workload(prompts, seed=2)), naive)
        assert llm.stats.preemptions > 10
        assert (llm.stats.cached_tokens > 0) == prefix_caching


def test_the_longest_answers_begin_first_so_that_steps_stay_full(directory: Path) -> None:
    lengths = [2, 3, 2, 12, 3]
    prompts = [[10 + index] for index in range(len(lengths))]
    params = [greedy_params(length) for length in lengths]
    steps = {}
    for name, order in (("all given at once", None), ("in their order", range(len(lengths)))):
        with small_llm(directory, max_num_seqs=2, max_model_len=88) as llm:
            outputs = llm.generate(prompts, params, priority=order, use_tqdm=False)
            steps[name] = llm.stats.steps
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
        assert [output.prompt_token_ids for output in outputs] == prompts
    assert steps["all given at once"] + 2 <= steps["in their order"]


@pytest.mark.parametrize("chunk", [8, 13, 64])
def test_the_step_size_changes_nothing(
    directory: Path, prompts: list[list[int]], naive: list[list[int]], chunk: int
) -> None:
    with small_llm(directory, decode_shape=False, max_num_batched_tokens=chunk) as llm:
        outputs = tokens_of(llm, prompts[:40], greedy_params(MAX_TOKENS))
    assert outputs == naive[:40]


def test_prefix_hits_change_nothing(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    """The same prompts again: all full pages but the last token's are found."""
    for _ in range(2):
        outputs = llm.generate(prompts[:16], greedy_params(8), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [n[:8] for n in naive[:16]]
    hits = [output.num_cached_tokens for output in outputs]
    assert hits == [(len(prompt) - 1) // 8 * 8 for prompt in prompts[:16]]


def test_other_salts_share_no_pages(llm: LLM, prompts: list[list[int]]) -> None:
    prompt = next(prompt for prompt in prompts if len(prompt) > 24)
    outputs = [
        llm.generate({"prompt_token_ids": prompt, "cache_salt": salt}, greedy_params(2))[0]
        for salt in ("mine", "yours", "mine")
    ]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, (len(prompt) - 1) // 8 * 8]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_a_prompt_cut_anywhere_gives_the_same_logits(directory: Path) -> None:
    (prompt,) = random_prompts(1, VOCAB_SIZE, 5, (30, 31))
    params = greedy_params(2, logprobs=20)
    with small_llm(directory, decode_shape=False, enable_prefix_caching=False) as llm:
        scheduler = llm._engine.scheduler

        def run(cut: int) -> tuple[list[int], np.ndarray]:
            """The tokens and logprobs of a prompt whose steps hold at most ``cut`` tokens."""
            scheduler.max_step_tokens = cut
            (job,) = drive(llm._engine, [Job(prompt, params)])
            return job.output, np.array([[v for _, v in each.top] for each in job.logprobs])

        tokens, logprobs = run(len(prompt))
        for cut in range(1, len(prompt)):
            cut_tokens, cut_logprobs = run(cut)
            assert cut_tokens == tokens
            np.testing.assert_allclose(cut_logprobs, logprobs, atol=2e-5)


# --- sampled --------------------------------------------------------------------------------------


def sampled_params(count: int) -> list[SamplingParams]:
    """All settings in all mixtures."""
    kinds = itertools.cycle(
        [
            {},
            {"temperature": 0.7, "top_p": 0.9},
            {"temperature": 1.3, "top_k": 20, "presence_penalty": 0.5},
            {"temperature": 0.0, "repetition_penalty": 1.3},
            {"frequency_penalty": 1.0, "logprobs": 5},
            {"temperature": 0.0},
            {"min_p": 0.1, "repetition_penalty": 0.8, "logprobs": 0},
            {"min_tokens": 5, "stop_token_ids": list(range(3, 19))},
        ]
    )
    return [
        SamplingParams(seed=index * 7919 - 40, max_tokens=MAX_TOKENS, ignore_eos=True, **kind)
        for index, kind in zip(range(count), kinds)
    ]


@pytest.fixture(scope="module")
def alone(llm: LLM, prompts: list[list[int]]) -> list[Job]:
    """48 sampled requests, one after the other."""
    params = sampled_params(48)
    return [drive(llm._engine, [Job(p, one)])[0] for p, one in zip(prompts, params)]


def check_same(jobs: list[Job], alone: list[Job]) -> None:
    for job, other in zip(jobs, alone, strict=True):
        assert job.output == other.output, job.params
        for one, two in zip(job.logprobs, other.logprobs, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                assert (one.token_id, one.rank) == (two.token_id, two.rank)
                assert [t for t, _ in one.top] == [t for t, _ in two.top]
                assert one.logprob == pytest.approx(two.logprob, abs=2e-5)


def test_a_sampled_request_is_the_same_in_any_batch(
    llm: LLM, prompts: list[list[int]], alone: list[Job]
) -> None:
    rng = np.random.default_rng(0)
    params = sampled_params(48)
    for spread in (1, 60):
        jobs = [Job(p, one, int(rng.integers(spread))) for p, one in zip(prompts, params)]
        check_same(drive(llm._engine, jobs), alone)


def test_a_sampled_request_is_the_same_after_preemption(
    directory: Path, prompts: list[list[int]], alone: list[Job]
) -> None:
    """The random key, the penalties' counts and the settings come back with the request."""
    settings = {"max_model_len": 88, "num_gpu_blocks_override": 14}
    with small_llm(directory, decode_shape=False, **settings) as llm:
        jobs = [Job(p, one) for p, one in zip(prompts, sampled_params(48))]
        check_same(drive(llm._engine, jobs), alone)
        assert llm.stats.preemptions > 5
        assert any(j.request.num_preemptions and j.params.has_penalties for j in jobs)


def test_n_completions_are_n_requests_with_the_next_seeds(
    llm: LLM, prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(prompts[:2], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        assert [one.index for one in output.outputs] == [0, 1, 2]
        for index, one in enumerate(output.outputs):
            single = params.replace(n=1, seed=11 + index)
            assert tokens_of(llm, [prompt], single) == [one.token_ids]


@pytest.mark.parametrize("seed", [-2, -3, 2**63 - 1])
def test_every_completion_of_a_seeded_request_can_be_repeated(llm: LLM, seed: int) -> None:
    """Also where ``seed + i`` would be -1, "no seed", or leave the 64 bits."""
    params = SamplingParams(n=3, seed=seed, max_tokens=6, ignore_eos=True)
    twice = [llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs for _ in range(2)]
    first, second = ([one.token_ids for one in outputs] for outputs in twice)
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 3


# --- ends -----------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_output_and_stands_in_it(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    stop = naive[0][4]
    end = naive[0].index(stop) + 1
    params = greedy_params(MAX_TOKENS, stop_token_ids=[stop])
    (output,) = llm.generate(prompts[:1], params, use_tqdm=False)
    (one,) = output.outputs
    assert one.token_ids == naive[0][:end]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)


def test_the_models_end_token_gives_no_stop_reason_and_can_be_ignored(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    (eos,) = llm._engine.eos_token_ids
    index = next(i for i, tokens in enumerate(naive) if eos in tokens[:-1])
    end = naive[index].index(eos) + 1
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    (output,) = llm.generate([prompts[index]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == naive[index][:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    assert tokens_of(llm, [prompts[index]], params.replace(ignore_eos=True)) == [naive[index]]


def test_before_min_tokens_no_end_is_chosen(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    """The stop token would come at once; ruling it out changes the text from there on."""
    stop = naive[0][0]
    params = greedy_params(MAX_TOKENS, stop_token_ids=[stop], min_tokens=6)
    (tokens,) = tokens_of(llm, prompts[:1], params)
    assert len(tokens) >= 6
    assert stop not in tokens[:6]
    assert stop not in tokens[:-1]


def test_max_tokens_end_with_the_context(llm: LLM) -> None:
    prompt = [5] * (llm.config.max_model_len - 3)
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=None))
    assert len(output.outputs[0].token_ids) <= 3
    assert output.outputs[0].finish_reason in ("length", "stop")


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [7, 0], ids=["a token", "the padding's token"])
def test_a_request_with_nan_fails_alone(
    directory: Path,
    prompts: list[list[int]],
    naive: list[list[int]],
    tmp_path: Path,
    poison: int,
) -> None:
    """Neither its neighbours nor those who get its pages later see anything of it."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sound = [i for i in range(60) if poison not in prompts[i] and poison not in naive[i]]
    settings = {"max_model_len": 88, "num_gpu_blocks_override": 24, "enable_prefix_caching": False}
    with small_llm(tmp_path, **settings) as llm:
        jobs = []
        for index in sound:
            ids = [9] * (index % 30) + [poison] + [11] * (index % 7)
            jobs.append(Job(ids, greedy_params(4)))
            jobs.append(Job(prompts[index], greedy_params(MAX_TOKENS)))
        drive(llm._engine, jobs)
        for bad, good, index in zip(jobs[::2], jobs[1::2], sound):
            assert (bad.request.finish_reason, bad.output) == (FinishReason.ERROR, [])
            assert good.output == naive[index]
        (output,) = llm.generate([[poison]], greedy_params(4), use_tqdm=False)
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []


def test_a_request_with_nothing_left_to_choose_fails_and_its_pages_are_forgotten(
    directory: Path, tmp_path: Path
) -> None:
    """Logits of -inf for every token but one, and that one is ruled out."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][:] = 0
    weights["model.norm.weight"][:] = 1
    weights["lm_head.weight"][np.arange(VOCAB_SIZE) != 9, 0] = -np.inf
    weights["model.embed_tokens.weight"][20] = np.eye(48, dtype=np.float32)[0] * 1e4
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with small_llm(tmp_path, decode_shape=False) as llm:
        params = greedy_params(1, stop_token_ids=[9])
        for one, reason in ((params, "stop"), (params.replace(min_tokens=1), "error")):
            (output,) = llm.generate([[20] * 20], one, use_tqdm=False)
            assert output.outputs[0].finish_reason == reason
        (output,) = llm.generate([[20] * 20], params, use_tqdm=False)
        assert output.num_cached_tokens == 0


class Interrupt(KeyboardInterrupt):
    """Ctrl-C."""


def test_ctrl_c_leaves_an_engine_that_works(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    calls = 0

    def on_text(output: RequestOutput, text: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise Interrupt

    with pytest.raises(Interrupt):
        llm.generate(prompts, greedy_params(MAX_TOKENS), use_tqdm=False, on_text=on_text)
    engine = llm._engine
    engine.scheduler.check_integrity()
    assert not engine.has_unfinished_requests
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_usable
    assert tokens_of(llm, prompts[:12], greedy_params(MAX_TOKENS)) == naive[:12]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "The prompt is empty"),
        ([5] * 512, "has 512 tokens, but max_model_len is 512"),
        ([5, 263], "holds 263; token ids are integers from 0 to 262"),
        ("text", "Without a tokenizer a prompt must be a list of token ids"),
        ({}, "A prompt is a text, a list of token ids"),
        (7.5, "A prompt is a text, a list of token ids"),
        ({"prompt_token_ids": 7}, "A prompt is a text, a list of token ids"),
        ([5, None], "holds None; token ids are integers"),
        ([True, 5], "holds True; token ids are integers"),
    ],
)
def test_one_impossible_prompt_refuses_the_whole_call(
    llm: LLM, prompt: object, message: str
) -> None:
    started = llm.stats.generation_tokens
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([[5, 6], prompt], greedy_params(4), use_tqdm=False)
    assert llm.stats.generation_tokens == started
    assert not llm._engine.has_unfinished_requests


def test_steps_begin_while_later_prompts_are_checked(
    llm: LLM, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    """And are given up if one of those is impossible."""
    steps = llm.stats.steps
    with pytest.raises(InvalidRequestError, match="The prompt is empty"):
        llm.generate([*prompts[:40], []], greedy_params(MAX_TOKENS), use_tqdm=False)
    assert llm.stats.steps > steps
    engine = llm._engine
    assert not engine.has_unfinished_requests
    engine.scheduler.check_integrity()
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_usable
    assert tokens_of(llm, prompts[:12], greedy_params(MAX_TOKENS)) == naive[:12]


def test_impossible_settings_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
        llm.generate([[5]], greedy_params(4, stop="x"))
    with pytest.raises(InvalidRequestError, match="2 sampling_params were given for 1 prompts"):
        llm.generate([[5]], [greedy_params(4)] * 2)
    with pytest.raises(InvalidRequestError, match="stop_token_ids holds 263"):
        llm.generate([[5]], greedy_params(4, stop_token_ids=[263]))
    with pytest.raises(InvalidRequestError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("prompts", [None, 5, 0.5, np.arange(3), {"text": "Hello"}], ids=repr)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: object) -> None:
    with pytest.raises(InvalidRequestError, match="A prompt is a text, a list of token ids"):
        llm.generate(prompts, greedy_params(4))


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


# --- the end --------------------------------------------------------------------------------------


def device_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("way", ["with", "close", "del"])
def test_the_end_frees_the_device_memory(directory: Path, way: str) -> None:
    before = device_bytes()
    llm = small_llm(directory, decode_shape=False)
    runner = llm._runner
    cache = runner._state.cache[0][0]
    assert device_bytes() > before + cache.nbytes
    if way == "with":
        with llm:
            pass
    elif way == "close":
        llm.close()
        llm.close()
    else:
        del llm
    assert cache.is_deleted()
    del runner, cache
    assert device_bytes() == before


def test_a_closed_llm_says_so(directory: Path) -> None:
    llm = small_llm(directory, decode_shape=False)
    llm.close()
    with pytest.raises(EngineClosedError, match="closed"):
        llm.generate([[5]])
    with pytest.raises(EngineClosedError, match="closed"):
        _ = llm.stats


def test_a_failed_start_leaves_nothing_behind(directory: Path) -> None:
    before = device_bytes()
    with pytest.raises(ConfigError, match="max_model_len=512"):
        small_llm(directory, max_model_len=512, num_gpu_blocks_override=10)
    assert device_bytes() == before


def test_two_engines_one_after_the_other(
    directory: Path, prompts: list[list[int]], naive: list[list[int]]
) -> None:
    for _ in range(2):
        with small_llm(directory, decode_shape=False) as llm:
            assert tokens_of(llm, prompts[:6], greedy_params(8)) == [n[:8] for n in naive[:6]]
