"""Greedy text of the engine equals that of transformers with many prompts at once, and with every
scaling of positions; tests/converters/families/ compares every family.

The engine gets all prompts at once: it cuts them into chunks, pages them and batches them with
other prompts. In float32 the tokens are equal; in 16 bits, logits lie within a stated error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters import open_checkpoint
from jaxserve import LLM, SamplingParams, demo
from tests.helpers.checkpoints import (
    SCALED,
    VOCAB_SIZE,
    make_checkpoint,
    prompt,
    reference_logits,
)
from tests.helpers.dense import dense_logits
from tests.helpers.engines import greedy_params, small_llm, tokens_of
from tests.helpers.hf import greedy, make_llama, random_prompts
from tests.helpers.loading import load

SEED = 7

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEMO_PROMPTS = [
    "Once upon a time",
    "The quick brown fox jumps over the lazy dog.",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, 東京 and 😀",
    "1 2 3 4",
]


def check_equal(
    directory: Path, prompts: list[list[int]], num_tokens: int, decode_shape: bool = True
) -> None:
    """The engine's tokens are transformers' for every prompt."""
    want = greedy(directory, prompts, num_tokens)
    with small_llm(directory, decode_shape) as llm:
        got = tokens_of(llm, prompts, greedy_params(num_tokens))
        allocator = llm._engine.scheduler.allocator
        assert allocator.num_free == allocator.num_usable
    wrong = [index for index in range(len(prompts)) if got[index] != want[index]]
    assert not wrong, f"prompts {wrong} of {len(prompts)} give other tokens"


def test_long_float32_texts_are_equal(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama-gqa")
    check_equal(directory, random_prompts(20, VOCAB_SIZE, SEED, distinct=6), 64)


@pytest.mark.parametrize("case", SCALED)
def test_texts_with_scaled_positions_are_equal(case: str, tmp_path: Path) -> None:
    """Up to the longest length, which lies beyond the original one."""
    directory = make_checkpoint(tmp_path, case)
    room = open_checkpoint(directory).config.max_model_len
    longest = min(60, room * 5 // 8)
    prompts = random_prompts(6, VOCAB_SIZE, SEED, (1, longest + 1), distinct=4)
    check_equal(directory, prompts, min(24, room - longest), decode_shape=False)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_old_names_of_position_settings_mean_the_same(kind: str, tmp_path: Path) -> None:
    new, old = (
        open_checkpoint(make_checkpoint(tmp_path / case, case)).config
        for case in (f"llama-{kind}", f"llama-{kind}-old")
    )
    assert new == old


def test_llama3_positions_beyond_the_original_length(tmp_path: Path) -> None:
    make_llama(tmp_path, rope_parameters=LLAMA3, max_position_embeddings=256)
    check_equal(tmp_path, random_prompts(6, VOCAB_SIZE, SEED, (40, 120)), 40, decode_shape=False)


def test_the_demo_model_writes_the_same_text() -> None:
    """With its own end tokens and the text that its tokenizer makes of the output."""
    directory = demo.target_path()
    with LLM(enforce_eager=True, use_tqdm=False, max_num_seqs=8, dtype="float32") as llm:
        outputs = llm.generate(
            DEMO_PROMPTS, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False
        )
        tokenizer, ends = llm.get_tokenizer(), llm._engine.eos_token_ids
    prompts = [tokenizer.encode(text) for text in DEMO_PROMPTS]
    for output, ids, tokens in zip(outputs, prompts, greedy(directory, prompts, 48), strict=True):
        assert output.prompt_token_ids == ids
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        completion = output.outputs[0]
        assert completion.token_ids == tokens
        assert completion.finish_reason == ("length" if end is None else "stop")
        whole = tokenizer.decode(ids + tokens, skip_special_tokens=True)
        assert completion.text == whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :]


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 4e-2), ("float16", 5e-3)])
@pytest.mark.parametrize("case", ["llama-gqa", "mistral-window", "qwen3", "opt-350m"])
def test_logits_in_16_bits_stay_near(case: str, dtype: str, bound: float, tmp_path: Path) -> None:
    """The largest error over all positions, against transformers in float32 with the same 16-bit
    weights, is below so much of the largest logit."""
    directory = make_checkpoint(tmp_path, case, dtype)
    want = reference_logits(directory, prompt(case))
    checkpoint = open_checkpoint(directory)
    got = dense_logits(checkpoint.config, load(checkpoint, dtype=dtype), prompt(case))
    assert got.dtype == np.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < bound, error


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_the_engine_in_16_bits_gives_logprobs_that_stay_near(
    dtype: str, bound: float, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path, "llama-gqa", dtype)
    ids = random_prompts(1, VOCAB_SIZE, SEED, (50, 51))[0]
    logits = reference_logits(directory, ids)[-1].astype(np.float64)
    want = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    with small_llm(directory, decode_shape=False, dtype=dtype) as llm:
        assert {array.dtype.name for array in llm._runner._params.values()} == {dtype}
        (output,) = llm.generate([ids], greedy_params(1, logprobs=20), use_tqdm=False)
    for token, logprob in output.outputs[0].logprobs[0].items():
        assert abs(logprob.logprob - want[token]) < bound * np.abs(logits).max()
