"""Embeddings are transformers' final hidden states, pooled and scaled, whatever runs beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, InvalidRequestError
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import greedy_params, small_llm, tokens_of
from tests.helpers.hf import random_prompts

CASES = ("llama-gqa", "llama-mha-tied", "qwen2-tied", "qwen3", "opt-125m", "opt-350m")


def reference(directory: Path, prompts: Sequence[Sequence[int]], pooling: str) -> np.ndarray:
    """transformers' last hidden states, pooled and scaled, [prompts, width]."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    vectors = []
    with torch.no_grad():
        for prompt in prompts:
            states = model(torch.tensor([list(prompt)])).last_hidden_state[0].double().numpy()
            vectors.append(states[-1] if pooling == "last" else states.mean(0))
    return np.array([vector / np.linalg.norm(vector) for vector in vectors])


def vectors_of(llm: LLM, prompts: Sequence[Sequence[int]], pooling: str) -> np.ndarray:
    outputs = llm.embed([list(prompt) for prompt in prompts], pooling=pooling)
    assert [output.prompt_token_ids for output in outputs] == [list(p) for p in prompts]
    return np.array([output.outputs.embedding for output in outputs])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with small_llm(directory) as llm:
        yield llm


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_final_hidden_states(case: str, tmp_path: Path) -> None:
    """Of prompts shorter and longer than a step, computed together."""
    directory = make_checkpoint(tmp_path, case)
    prompts = [[7], *random_prompts(6, VOCAB_SIZE, 1, (2, 130))]
    with small_llm(directory, decode_shape=False) as llm:
        for pooling in ("last", "mean"):
            got = vectors_of(llm, prompts, pooling)
            np.testing.assert_allclose(got, reference(directory, prompts, pooling), atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_prefix_cache_changes_nothing(llm: LLM, directory: Path, pooling: str) -> None:
    """The last token's state needs no others; the mean needs all and reads no cached prefix."""
    prompts = random_prompts(2, VOCAB_SIZE, 2, (40, 60))
    for _ in range(2):
        got = vectors_of(llm, prompts, pooling)
        np.testing.assert_allclose(got, reference(directory, prompts, pooling), atol=1e-4)
    cached = [output.num_cached_tokens for output in llm.embed(prompts, pooling=pooling)]
    assert cached == ([(len(p) - 1) // 8 * 8 for p in prompts] if pooling == "last" else [0, 0])


def test_generations_beside_them_get_their_tokens(llm: LLM, directory: Path) -> None:
    prompts = random_prompts(4, VOCAB_SIZE, 3, (5, 100))
    alone = tokens_of(llm, prompts, greedy_params(12))
    engine = llm._engine
    requests = [engine.add(f"g{i}", p, greedy_params(12)) for i, p in enumerate(prompts)]
    for index, prompt in enumerate(prompts):
        engine.embed(f"e{index}", prompt, "mean" if index % 2 else "last")
    vectors = {}
    while engine.has_unfinished_requests:
        for update in engine.step():
            if update.embedding is not None:
                assert update.token_id is None
                vectors[update.request.request_id] = update.embedding
        engine.scheduler.check_integrity()
    assert [request.output_token_ids for request in requests] == alone
    for index, prompt in enumerate(prompts):
        want = reference(directory, [prompt], "mean" if index % 2 else "last")[0]
        np.testing.assert_allclose(vectors[f"e{index}"], want, atol=1e-4)


def test_a_mean_survives_the_loss_of_its_pages(directory: Path) -> None:
    """Generations that came before take the pages of prompts that are half computed."""
    old = random_prompts(5, VOCAB_SIZE, 4, (8, 12))
    new = random_prompts(2, VOCAB_SIZE, 5, (79, 80))
    with small_llm(
        directory,
        decode_shape=False,
        max_model_len=88,
        num_gpu_blocks_override=28,
        max_num_batched_tokens=8,
    ) as llm:
        engine = llm._engine
        for index, prompt in enumerate(old):
            engine.add(f"g{index}", prompt, greedy_params(60))
        for _ in range(8):
            engine.step()
        requests = [engine.embed(f"e{i}", p, "mean", priority=1) for i, p in enumerate(new)]
        while engine.has_unfinished_requests:
            engine.step()
        assert sum(request.num_preemptions for request in requests) > 0
    got = np.array([request.embedding for request in requests])
    np.testing.assert_allclose(got, reference(directory, new, "mean"), atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "pooling", "param"),
    [
        ([[5], []], "last", "prompt"),
        ([[5]], "first", "pooling"),
        ([[VOCAB_SIZE]], "mean", "prompt"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_leaves_nothing_behind(
    llm: LLM, prompts: list, pooling: str, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        llm.embed(prompts, pooling=pooling)
    assert error.value.param == param
    assert not llm._engine.has_unfinished_requests
