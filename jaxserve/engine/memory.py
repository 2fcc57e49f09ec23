"""How many KV pages fit beside the weights and the largest step, before either is there.

The weights' sizes are declared, so the cache is sized before they are loaded, and programs, which
hold the number of pages as a shape, are compiled meanwhile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax._src.xla_bridge import backends_are_initialized  # public JAX doesn't tell
from jax.sharding import Mesh

from jaxserve.config import ResolvedConfig
from jaxserve.engine.page_tables import longest_sequence, most_pages
from jaxserve.errors import ConfigError
from jaxserve.model import kv_cache
from jaxserve.model.config import MLPSpec, ModelConfig, MoESpec

GIB = 2**30
CPU_CACHE_BYTES = GIB
"""Size of the KV cache on a CPU, where nobody expects all memory to be taken."""
ROUNDING = 256
"""XLA's allocator rounds arrays up to this many bytes (its BFCAllocator's kMinAllocationSize)."""
UNSPLIT = 128 * 2**20
"""XLA's allocator hands out a free region whole if less than this would remain of it (the
``max_internal_fragmentation_bytes`` of its BFCAllocator)."""
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Variables that give JAX's allocator a share of the device memory, read when JAX first touches
the GPU; the second is the older name, and both at once are an error."""

DEFAULT_FRACTION = 0.75
"""The share that JAX's allocator takes if no variable gives it one."""


def claim_memory(utilization: float) -> float:
    """Makes JAX's allocator take a share of the GPU's memory, if it isn't made yet and no variable
    gives it another; returns the share that it was given.

    Raises:
        ConfigError: a variable holds no share.
    """
    for name in FRACTIONS:
        text = os.environ.get(name)
        if text:
            try:
                fraction = float(text)
            except ValueError:
                fraction = 0.0
            if not 0 < fraction <= 1:
                raise ConfigError(f"{name}={text} must be above 0, at most 1.")
            return fraction
    if backends_are_initialized():
        return DEFAULT_FRACTION
    os.environ[FRACTIONS[0]] = str(utilization)
    return utilization


def take_memory(devices: Sequence[Any]) -> None:
    """Lets JAX's allocator take its share of GPUs' memory, as it does with the first array there.

    If other processes hold memory, the share is smaller. ``plan_memory`` sees that afterwards;
    else it would show when the cache is made, whose every array waits 10 s before it fails.
    """
    jax.block_until_ready([jax.device_put(np.zeros(1), device) for device in devices])


@dataclass(frozen=True)
class MemoryPlan:
    """What one device's memory goes to, in bytes.

    Attributes:
        num_pages: KV pages, the padding page included.
        page_bytes: one page's keys and values in all layers, on one device.
        in_use: what was there before this engine.
        weights: the model's, on one device.
        activations: kept for the largest step.
        slack: kept for what the allocator can't use.
        limit: what we may use and can have.
        held: by other processes, of what we might use besides.
    """

    num_pages: int
    page_bytes: int
    in_use: int
    weights: int
    activations: int
    slack: int
    limit: int
    held: int = 0

    @property
    def cache(self) -> int:
        """Bytes of the KV cache."""
        return self.num_pages * self.page_bytes

    @property
    def total(self) -> int:
        """Bytes of everything together."""
        return self.in_use + self.weights + self.activations + self.slack + self.cache

    def __str__(self) -> str:
        parts = {
            "in use before": self.in_use,
            "weights": self.weights,
            "activations": self.activations,
            "slack": self.slack,
            f"KV cache ({self.num_pages} pages)": self.cache,
        }
        words = [f"{name} {size / GIB:.2f} GiB" for name, size in parts.items()]
        others = f" ({self.held / GIB:.2f} GiB more are held by others)" if self.held else ""
        return f"{', '.join(words)} of {self.limit / GIB:.2f} GiB{others}"


def plan_memory(
    config: ResolvedConfig,
    model: ModelConfig,
    weights: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    dtype: jnp.dtype,
    fraction: float,
) -> MemoryPlan:
    """Sizes the KV cache, before the weights are loaded.

    On a device that tells its memory, everything together stays below ``gpu_memory_utilization`` of
    it, unless the cache's size was given; ``check_fits`` refuses that.

    Args:
        config: resolved.
        model: as split by ``for_tensor_parallel``.
        weights: shapes and shardings.
        mesh: the devices.
        dtype: of the cache.
        fraction: share of the device memory that JAX's allocator was given.
    """
    pages = jax.tree.leaves(kv_cache.shapes(model, 1, config.block_size, dtype, mesh))
    page_bytes = sum(shard_bytes(page) for page in pages)
    shards = [_rounded(shard_bytes(weight)) for weight in weights.values()]
    weight_bytes = sum(shards)
    activations = activation_bytes(config, model, dtype)
    in_use, limit, held = _device_memory(
        mesh.local_devices, config.gpu_memory_utilization, fraction
    )
    slack = 0
    if limit is not None:
        # Making a weight may take as much memory again (that it takes less isn't measured). What
        # it gives back may lie between two weights, where steps can use it but none of the cache's
        # large arrays has room. And each of those is rounded.
        slack = max(shards) + UNSPLIT + ROUNDING * len(pages)
        if _allocator_grows():
            left = limit - in_use - weight_bytes - slack
            slack += _lost_by_growing(left, len(pages), activations)
        cache_bytes = limit - in_use - weight_bytes - activations - slack
    else:
        in_use, limit = psutil.Process().memory_info().rss, psutil.virtual_memory().total
        # More than every row's longest sequence would never be used.
        windows = model.page_groups.windows
        one = most_pages(windows, config.max_model_len, config.block_size, config.num_tokens_ahead)
        most = config.max_num_seqs * one * page_bytes
        available = (psutil.virtual_memory().available - weight_bytes * mesh.size) // 2
        cache_bytes = min(CPU_CACHE_BYTES, most, available)
    if config.kv_cache_memory_bytes is not None:
        cache_bytes = config.kv_cache_memory_bytes
    usable = config.num_gpu_blocks_override or max(cache_bytes // page_bytes - 1, 0)
    return MemoryPlan(usable + 1, page_bytes, in_use, weight_bytes, activations, slack, limit, held)


def _device_memory(
    devices: Iterable[Any], utilization: float, fraction: float
) -> tuple[int, int | None, int]:
    """(bytes in use, bytes that we may use in all, what other processes hold of these) of the
    fullest device; no limit if it tells none, as CPUs do."""
    fullest: tuple[int, int | None, int] = 0, None, 0
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            continue
        # Of an allocator that was given more for an earlier engine, we leave the rest.
        wanted = int(stats["bytes_limit"] * min(1.0, utilization / fraction))
        # An allocator that takes its share at once has all that it could get.
        taken = None if _allocator_grows() else stats.get("pool_bytes")
        limit, in_use = min(wanted, taken or wanted), stats["bytes_in_use"]
        if fullest[1] is None or limit - in_use < fullest[1] - fullest[0]:
            fullest = in_use, limit, wanted - limit
    return fullest


def _allocator_grows() -> bool:
    """Whether JAX's allocator was told to take memory when it is needed only."""
    return os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") in ("false", "False", "0")


def _lost_by_growing(left: int, arrays: int, largest: int) -> int:
    """The bytes that an allocator can lose that grows, while it hands out as many equal arrays as
    large as possible, and then a largest one.

    It grows by regions that double (the BFCAllocator's ``Extend``). Each holds at least twice as
    many arrays as the one before, and less than one more would fit into it; the last region of the
    weights may lose as much.
    """
    regions = arrays.bit_length() + 1
    return regions * max(largest, left // (arrays + regions))


def shard_bytes(aval: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array's part on one device."""
    assert aval.sharding is not None
    return math.prod(aval.sharding.shard_shape(aval.shape)) * aval.dtype.itemsize


def _rounded(size: int) -> int:
    return -(-size // ROUNDING) * ROUNDING


def room_for(plan: MemoryPlan, config: ResolvedConfig, windows: Sequence[int | None]) -> int:
    """Tokens of the longest sequence that the cache can hold.

    Args:
        windows: of the model's page tables, see PageTables.
    """
    return longest_sequence(windows, plan.num_pages - 1, config.block_size, config.num_tokens_ahead)


def check_fits(
    plan: MemoryPlan, config: ResolvedConfig, windows: Sequence[int | None] = (None,)
) -> None:
    """Checks that one sequence of ``max_model_len`` fits, and that all together does.

    Args:
        windows: of the model's page tables, see PageTables.

    Raises:
        ConfigError: it doesn't; gives the numbers and the remedy.
    """
    room = room_for(plan, config, windows)
    if room < config.max_model_len:
        length = config.max_model_len
        pages = most_pages(windows, length, config.block_size, config.num_tokens_ahead)
        needed = pages * plan.page_bytes / GIB
        shorter = f"Set max_model_len={room} or less, or raise" if room else "Raise"
        raise ConfigError(
            f"A sequence of max_model_len={config.max_model_len} tokens needs {needed:.2f} GiB of "
            f"KV cache, but there is room for {room} tokens ({plan}). "
            f"{shorter} gpu_memory_utilization or tensor_parallel_size{_or_free(plan)}."
        )
    if plan.total > plan.limit:
        raise ConfigError(
            f"That is {(plan.total - plan.limit) / GIB:.2f} GiB more than there is to use: {plan}. "
            "Lower kv_cache_memory_bytes or num_gpu_blocks_override, or raise "
            f"gpu_memory_utilization{_or_free(plan)}."
        )


def _or_free(plan: MemoryPlan) -> str:
    """The remedy against other processes."""
    return ", or end the processes that nvidia-smi names" if plan.held else ""


def activation_bytes(config: ResolvedConfig, model: ModelConfig, dtype: jnp.dtype) -> int:
    """An upper estimate of one device's scratch memory in the largest step, in bytes."""
    tp, size = config.tensor_parallel_size, jnp.dtype(dtype).itemsize
    widest = max(
        6 * model.hidden_size
        + _ffn_values(layer.ffn, model.hidden_size, tp)
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


def _ffn_values(spec: MLPSpec | MoESpec, hidden: int, tp: int) -> int:
    """How many values of a token one device keeps at once in a feed-forward network: gate, up and
    what becomes of them. Of experts, those of each pair of a token and an expert, with the pair's
    input and its output in float32; devices that share out the experts all keep all pairs."""
    if isinstance(spec, MLPSpec):
        return 3 * spec.intermediate_size // tp
    width = spec.intermediate_size // (tp if spec.num_experts % tp else 1)
    shared = 0 if spec.shared is None else _ffn_values(spec.shared, hidden, tp)
    return spec.router.top_k * 3 * (width + hidden) + shared
