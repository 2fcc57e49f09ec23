"""Greedy generation by transformers in float32: the oracle for the engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
            # A fresh copy: dynamic rope leaves the frequencies of the last prompt in the model.
            fresh = copy.deepcopy(model)
            ids = torch.tensor([list(prompt)])
            out = fresh.generate(
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
