"""On a GPU: the same tokens as transformers, through the Triton kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.hf import greedy, random_prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ["llama-gqa", "mistral-window", "qwen3", "opt-125m"])
def test_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, case)
    prompts = random_prompts(20, VOCAB_SIZE, seed=1)
    with LLM(
        directory,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        use_tqdm=False,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        gpu_memory_utilization=0.2,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == greedy(directory, prompts, 64)
