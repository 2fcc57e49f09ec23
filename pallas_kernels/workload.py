"""What the ops' cases are made of: shapes of models' layers, what a call costs, random inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 2**22 - 3
"""Most random numbers drawn for one array; longer arrays repeat them. Odd, so that no two pages of
a pool are equal."""


class Cost(NamedTuple):
    """What a call can't do without: bytes of device memory read and written, once each, and
    floating-point operations (a multiply-add counts two)."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer as the kernels of one device see it.

    Attributes:
        heads, kv_heads, head_size: of attention.
        hidden, ffn: widths of the residual stream and of the feed-forward network.
        page_size: tokens per KV page.
        sliding_window: None sees all.
        softcap, alibi, sinks: see ``paged_attention.Variant``.
        num_experts, top_k: of a mixture of experts, each ``ffn`` wide; 0 for a dense layer.
        activation, biased: of its experts, see ``expert_ffn``.
        rotates, normalizes: whether queries and keys are rotated, and normalized per head.
        rotary_size: how many of a head's dimensions rotate; None rotates all of them.
        dtype: of weights, activations and cache.
        latent_size: of latent attention, how many of a key's head_size dimensions are its value.
    """

    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    ffn: int
    page_size: int = 16
    sliding_window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    num_experts: int = 0
    top_k: int = 0
    activation: str = "silu"
    biased: bool = False
    rotates: bool = True
    rotary_size: int | None = None
    normalizes: bool = False
    dtype: str = "bfloat16"
    latent_size: int | None = None


LLAMA_1B = LayerShape(heads=32, kv_heads=8, head_size=64, hidden=2048, ffn=8192)
"""Llama-3.2-1B's layers."""
LLAMA_8B = LayerShape(heads=32, kv_heads=8, head_size=128, hidden=4096, ffn=14336)
"""Llama-3.1-8B's layers."""
DEEPSEEK_V2_LITE = LayerShape(
    heads=16, kv_heads=1, head_size=576, hidden=2048, ffn=10944, latent_size=512
)
"""DeepSeek-V2-Lite's layers."""
DEEPSEEK_V3 = LayerShape(
    heads=128, kv_heads=1, head_size=576, hidden=7168, ffn=18432, latent_size=512
)
"""DeepSeek-V3's layers."""
MIXTRAL_8X7B = LayerShape(
    heads=32, kv_heads=8, head_size=128, hidden=4096, ffn=14336, num_experts=8, top_k=2
)
"""Mixtral-8x7B's layers."""
QWEN3_30B_A3B = LayerShape(
    heads=32, kv_heads=4, head_size=128, hidden=2048, ffn=768, num_experts=128, top_k=8
)
"""Qwen3-30B-A3B's layers."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Random numbers of the standard normal distribution."""
    size = math.prod(shape)
    if size <= BLOCK:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    block = jnp.asarray(rng.standard_normal(BLOCK, np.float32), dtype)
    return jnp.tile(block, -(-size // BLOCK))[:size].reshape(shape)
