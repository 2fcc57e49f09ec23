"""Greedy generation by transformers in float32: the oracle for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def greedy(directory: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The next ``num_tokens`` greedy tokens of each prompt; end tokens don't end them."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    outputs = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=0,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def random_prompts(
    count: int, vocab_size: int, seed: int, lengths: tuple[int, int] = (1, 60)
) -> list[list[int]]:
    """Prompts of random ids and random lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, rng.integers(*lengths)).tolist() for _ in range(count)]
