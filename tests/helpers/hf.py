"""Greedy generation by transformers in float32: the oracle for the engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def greedy(directory: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The next ``num_tokens`` greedy tokens of each prompt; end tokens don't end them.

    Prompts of equal length are computed together; nothing is ever padded.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # these models are too small to share among cores
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    outputs: dict[int, list[int]] = {}
    with torch.no_grad():
        for length in sorted({len(prompt) for prompt in prompts}):
            # A fresh copy: dynamic rope leaves the frequencies of the last prompt in the model.
            fresh = copy.deepcopy(model)
            alike = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([list(prompts[index]) for index in alike])
            out = fresh.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=0,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            outputs |= dict(zip(alike, out[:, length:].tolist(), strict=True))
    return [outputs[index] for index in range(len(prompts))]


def random_prompts(
    count: int,
    vocab_size: int,
    seed: int,
    lengths: tuple[int, int] = (1, 60),
    distinct: int | None = None,
) -> list[list[int]]:
    """Prompts of random ids and random lengths, of which at most ``distinct`` differ."""
    rng = np.random.default_rng(seed)
    several = [int(rng.integers(*lengths)) for _ in range(distinct or count)]
    return [
        rng.integers(3, vocab_size, several[index % len(several)]).tolist()
        for index in range(count)
    ]


def make_llama(directory: Path, seed: int = 0, **settings: Any) -> Path:
    """Writes a random float32 Llama checkpoint with settings of one's own choice."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    sizes = {
        "vocab_size": 263,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else 0.15 * noise)
    model.save_pretrained(directory)
    return directory
