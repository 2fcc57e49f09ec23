"""How many KV pages fit: measured free memory minus what the largest step needs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import psutil

from jaxserve.config import ResolvedConfig
from jaxserve.errors import ConfigError
from jaxserve.model.config import ModelConfig
from jaxserve.model.kv_cache import bytes_per_page

GIB = 2**30
CPU_CACHE_BYTES = GIB
"""Size of the KV cache on a CPU, where nobody expects all memory to be taken."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one device's memory goes to, in bytes.

    Attributes:
        num_pages: KV pages, the padding page included.
        page_bytes: one page's keys and values in all layers, on one device.
        in_use: weights and whatever else was there before.
        activations: kept for the largest step.
        limit: what we may use.
    """

    num_pages: int
    page_bytes: int
    in_use: int
    activations: int
    limit: int

    def __str__(self) -> str:
        cache = self.num_pages * self.page_bytes
        return (
            f"weights {self.in_use / GIB:.2f} GiB, activations {self.activations / GIB:.2f} GiB, "
            f"KV cache {cache / GIB:.2f} GiB ({self.num_pages} pages) of {self.limit / GIB:.2f} GiB"
        )


def plan_memory(config: ResolvedConfig, model: ModelConfig, dtype: jnp.dtype) -> MemoryPlan:
    """Sizes the KV cache, once the weights are loaded.

    Args:
        config: resolved.
        model: as split by ``for_tensor_parallel``.
        dtype: of the cache.
    """
    page_bytes = bytes_per_page(model, config.block_size, dtype) // config.tensor_parallel_size
    activations = activation_bytes(config, model, dtype)
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        in_use, limit = stats["bytes_in_use"], stats["bytes_limit"]
        cache_bytes = limit - in_use - activations
    else:
        in_use, limit = psutil.Process().memory_info().rss, psutil.virtual_memory().total
        # More than every row's longest sequence would never be used.
        most = config.max_num_seqs * -(-config.max_model_len // config.block_size) * page_bytes
        available = psutil.virtual_memory().available // 2
        cache_bytes = max(min(CPU_CACHE_BYTES, most, available), 0)
    if config.kv_cache_memory_bytes is not None:
        cache_bytes = config.kv_cache_memory_bytes
    usable = config.num_gpu_blocks_override or max(cache_bytes // page_bytes - 1, 0)
    return MemoryPlan(usable + 1, page_bytes, in_use, activations, limit)


def check_fits(plan: MemoryPlan, config: ResolvedConfig) -> None:
    """Checks that one sequence of ``max_model_len`` fits.

    Raises:
        ConfigError: it doesn't; gives the numbers and the remedy.
    """
    room = (plan.num_pages - 1) * config.block_size
    if room < config.max_model_len:
        needed = config.max_model_len / config.block_size * plan.page_bytes / GIB
        shorter = f"Set max_model_len={room} or less, or raise" if room else "Raise"
        raise ConfigError(
            f"A sequence of max_model_len={config.max_model_len} tokens needs {needed:.2f} GiB of "
            f"KV cache, but there is room for {room} tokens ({plan}). "
            f"{shorter} gpu_memory_utilization or tensor_parallel_size."
        )


def activation_bytes(config: ResolvedConfig, model: ModelConfig, dtype: jnp.dtype) -> int:
    """An upper estimate of one device's scratch memory in the largest step, in bytes."""
    tp, size = config.tensor_parallel_size, jnp.dtype(dtype).itemsize
    widest = max(
        6 * model.hidden_size
        + 3 * layer.ffn.intermediate_size // tp
        + 3
        * (layer.attention.num_heads + 2 * layer.attention.num_kv_heads)
        * layer.attention.head_size
        // tp
        for layer in model.layers
    )
    step = config.max_num_batched_tokens * widest * size
    # Token counts, logits, their adjusted copy, noise and what a softmax needs, four bytes each.
    sampling = 7 * config.max_num_seqs * model.vocab_size * 4
    return step + sampling + GIB // 4
