"""The real runner: its buckets, its choices, long page tables, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM
from jaxserve.config import DeviceFacts, EngineConfig, ResolvedConfig
from jaxserve.engine import step as step_module
from jaxserve.engine.batch import Bucket
from jaxserve.engine.runner import make_buckets, step_sizes
from jaxserve.model import one_token
from jaxserve.sampling.params import SamplingParams
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import Job, drive, greedy_params, small_llm, tokens_of
from tests.helpers.hf import random_prompts

# --- buckets --------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 100, 256, 300, 512]
STEPS = [1, 2, 5, 8, 16, 63, 64, 65, 128, 200, 512, 513, 2048, 8192]


def resolved(rows: int, tokens: int, platform: str) -> ResolvedConfig:
    config = EngineConfig(max_num_seqs=rows, max_num_batched_tokens=tokens)
    return config.resolve(DeviceFacts(platform, 1), 4096)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("rows", SIZES)
def test_every_step_fits_a_bucket(rows: int, platform: str) -> None:
    for tokens in (step for step in STEPS if step >= rows):
        buckets = make_buckets(resolved(rows, tokens, platform), platform)
        assert len(set(buckets)) == len(buckets)
        assert buckets == sorted(buckets, key=lambda bucket: (bucket.tokens, bucket.lanes))
        assert all(bucket.lanes <= rows for bucket in buckets)
        assert max(bucket.tokens for bucket in buckets) <= max(tokens, rows + 1)
        for lanes in {1, (rows + 1) // 2, rows}:
            for size in {lanes, min(lanes + 1, tokens), (lanes + tokens) // 2, tokens}:
                assert any(bucket.fits(lanes, size) for bucket in buckets), (lanes, size)
        assert any(bucket.decode_only for bucket in buckets)
        assert any(not bucket.decode_only for bucket in buckets)


def test_the_scheduler_fills_the_buckets_that_hold_all_rows() -> None:
    buckets = make_buckets(resolved(256, 8192, "gpu"), "gpu")
    assert step_sizes(buckets) == [512, 1024, 2048, 4096, 8192]
    assert step_sizes(make_buckets(resolved(64, 256, "cpu"), "cpu")) == [128, 256]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_buckets_are_few(platform: str) -> None:
    assert len(make_buckets(resolved(256, 8192, platform), platform)) <= 16


def test_steps_of_one_token_may_have_a_shape_of_their_own() -> None:
    config = resolved(256, 8192, "gpu")
    one, *others = make_buckets(config, "gpu", single=True)
    assert (one.lanes, one.tokens) == (1, 1) and others == make_buckets(config, "gpu")
    # It is for short sequences.
    assert one.fits(1, 1, one_token.MAX_CONTEXT) and not one.fits(1, 1, one_token.MAX_CONTEXT + 1)
    assert others[0].fits(1, 1, one_token.MAX_CONTEXT + 1)


def test_decoding_wastes_little() -> None:
    """At most half of the lanes of a decoding step are padding, on a GPU from 8 requests on, on a
    CPU from 16."""
    for platform, least in (("gpu", 8), ("cpu", 16)):
        buckets = make_buckets(resolved(256, 8192, platform), platform)
        for lanes in range(least, 257):
            first = next(bucket for bucket in buckets if bucket.fits(lanes, lanes))
            assert first.decode_only
            assert first.lanes <= max(least, 2 * lanes - 1)


# --- steps ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with small_llm(directory) as llm:
        yield llm


def test_the_smallest_ready_bucket_is_taken(llm: LLM) -> None:
    runner = llm._runner
    llm.generate([[5, 6]], greedy_params(3), use_tqdm=False)
    ready = {key[1] for key in runner.programs._ready if key[0] == "forward"}
    assert ready == {Bucket(8, 8), Bucket(8, 48)}
    assert runner._choose(1, 1, "greedy")[0] == Bucket(8, 8)
    assert runner._choose(1, 2, "greedy")[0] == Bucket(8, 48)
    # With no sampler ready for any, the smallest is compiled.
    assert runner._choose(1, 1, "full")[0] == Bucket(1, 1)


def test_a_shape_for_short_sequences_is_left_to_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = []
    choose = llm._runner._choose

    def spied(lanes: int, tokens: int, variant: Any, context: int, largest: bool) -> Any:
        contexts.append(context)
        return choose(lanes, tokens, variant, context, largest)

    monkeypatch.setattr(llm._runner, "_choose", spied)
    llm.generate([[5, 6, 7]], greedy_params(3), use_tqdm=False)
    assert contexts[:3] == [3, 4, 5]


def test_a_prompt_with_more_new_pages_than_a_step_can_enter(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pages of a prompt are entered with its first chunk: 60 here, where a step has 14 cells.
    They go in pieces, here of 16."""
    monkeypatch.setattr(step_module, "TABLE_PIECE", 16)
    (prompt,) = random_prompts(1, VOCAB_SIZE, 1, (480, 481))
    with small_llm(directory) as llm:
        layout = llm._runner._layouts[Bucket(8, 48)]
        assert layout.num_table_updates < 60
        want = tokens_of(llm, [prompt], greedy_params(8))
        assert ("write_table",) in llm._runner.programs._ready
        # A table that holds everything in one step's own cells gives the same.
        with small_llm(directory, max_num_batched_tokens=512, decode_shape=False) as wide:
            assert tokens_of(wide, [prompt], greedy_params(8)) == want
            assert ("write_table",) not in wide._runner.programs._ready


def test_counts_longer_than_a_piece_are_counted_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(2, VOCAB_SIZE, 2, (40, 60))
    params = greedy_params(10, repetition_penalty=1.5)
    results = []
    for piece in (16, 512):
        monkeypatch.setattr(step_module, "COUNT_PIECE", piece)
        with small_llm(directory, decode_shape=False) as llm:
            results.append(tokens_of(llm, prompts, params))
            counts = np.asarray(llm._runner._state.sampler.counts)
        for row, prompt in enumerate(prompts):
            assert set(np.flatnonzero(counts[row] >= 1 << 30)) == set(prompt)
            assert (counts[row] & ((1 << 30) - 1)).sum() >= 10
    assert results[0] == results[1]


def test_the_next_owner_of_a_row_finds_nothing_of_the_one_before(llm: LLM) -> None:
    """Counts and settings: a penalized request after another in the same row."""
    prompts = random_prompts(2, VOCAB_SIZE, 3, (10, 20))
    params = SamplingParams(
        max_tokens=10, seed=1, repetition_penalty=1.8, frequency_penalty=1.0, ignore_eos=True
    )
    first = tokens_of(llm, prompts[:1], params)
    tokens_of(llm, prompts[1:], params.replace(temperature=0.3, top_k=3))
    tokens_of(llm, prompts[1:], greedy_params(10))
    assert tokens_of(llm, prompts[:1], params) == first


def test_only_those_who_ask_get_logprobs(llm: LLM) -> None:
    jobs = [Job([5, 6], greedy_params(4, logprobs=wanted)) for wanted in (None, 0, 3, 20)]
    drive(llm._engine, jobs)
    assert jobs[0].logprobs == [None] * 4
    for job in jobs[1:]:
        for logprobs, token in zip(job.logprobs, job.output, strict=True):
            assert (logprobs.token_id, logprobs.rank) == (token, 1)
            assert len(logprobs.top) == job.params.logprobs
            if logprobs.top:
                assert logprobs.top[0] == (token, logprobs.logprob)
            values = [value for _, value in logprobs.top]
            assert values == sorted(values, reverse=True)
    assert len({tuple(job.output) for job in jobs}) == 1


def test_steps_are_counted(directory: Path) -> None:
    with small_llm(directory) as llm:
        tokens_of(llm, [[5] * 10], greedy_params(4))
        stats = llm.stats
        assert stats.steps == 4  # the last token is chosen, not computed
        assert stats.scheduled_tokens == 10 + 3
        assert stats.padded_tokens == 48 + 3 * 8
        assert stats.padding_waste == pytest.approx(1 - 13 / 72)
        assert (stats.prompt_tokens, stats.generation_tokens) == (10, 4)


def test_close_deletes_what_it_owns(directory: Path) -> None:
    llm = small_llm(directory, decode_shape=False)
    runner = llm._runner
    owned = jax.tree.leaves(runner._state)
    llm.close()
    assert all(array.is_deleted() for array in owned)
    assert runner._params is None
