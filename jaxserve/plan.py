"""What a model would take on accelerators, from its config alone. A composition root."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax

from jaxserve.build import choose_dtype
from jaxserve.config import DeviceFacts, EngineConfig
from jaxserve.distributed import LOGICAL_TO_MESH, make_abstract_mesh
from jaxserve.engine.memory import activation_bytes, shard_bytes
from jaxserve.engine.page_tables import longest_sequence, most_pages
from jaxserve.model import decoder, kv_cache
from jaxserve.model import params as model_params
from jaxserve.model.config import ModelConfig


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; those that say so are of one device.

    Attributes:
        architecture, dtype, devices, max_model_len: of what it is the plan.
        parameters: their number, each counted once.
        weights, device_weights: of all devices and of one.
        device_activations: an upper estimate of a step's scratch memory.
        token: keys and values of one token in all layers, on all devices.
        device_page: one page, of which a column of ``block_size`` tokens takes ``tables``.
        sequence_pages: most pages that a sequence of ``max_model_len`` tokens holds.
        device_sequence: the same in bytes.
        device_memory: what may be used of each device; None if it isn't known.
        pages: how many fit beside weights and activations.
        longest: tokens of the longest sequence that fits.
    """

    architecture: str
    dtype: str
    devices: int
    max_model_len: int
    parameters: int
    weights: int
    device_weights: int
    device_activations: int
    token: int
    device_page: int
    tables: int
    block_size: int
    sequence_pages: int
    device_memory: int | None
    pages: int | None
    longest: int | None

    @property
    def device_sequence(self) -> int:
        """Bytes on one device of a sequence of ``max_model_len`` tokens."""
        return self.sequence_pages * self.device_page

    @property
    def sequences(self) -> int | None:
        """How many sequences of ``max_model_len`` tokens fit at once."""
        return None if self.pages is None else self.pages // self.sequence_pages


def make_plan(wanted: EngineConfig, model: ModelConfig, device_memory: int | None) -> Plan:
    """The plan of a model on ``wanted.tensor_parallel_size`` accelerators, whatever is here.

    Args:
        wanted: settings of the engine.
        model: as the checkpoint's config describes it.
        device_memory: bytes of each device; ``gpu_memory_utilization`` of them is used.

    Raises:
        ConfigError: the settings contradict each other or the model.
    """
    size = wanted.tensor_parallel_size
    config = wanted.resolve(DeviceFacts("gpu", size), model.max_model_len)
    split = decoder.for_tensor_parallel(model, size)
    split = dataclasses.replace(split, max_model_len=config.max_model_len)
    mesh = make_abstract_mesh(size)
    dtype = choose_dtype(config.dtype, model.dtype, "gpu")
    tree = decoder.declare(split)
    specs = model_params.partition_specs(tree, LOGICAL_TO_MESH, dict(mesh.shape))
    weights = model_params.sharded(tree, dtype, mesh, specs)
    pages = jax.tree.leaves(kv_cache.shapes(split, 1, config.block_size, dtype, mesh))
    device_weights = sum(map(shard_bytes, weights.values()))
    device_page = sum(map(shard_bytes, pages))
    activations = activation_bytes(config, split, dtype)
    windows = split.page_groups.windows
    ahead = config.num_tokens_ahead
    usable = number = longest = None
    if device_memory is not None:
        usable = int(device_memory * config.gpu_memory_utilization)
        number = max((usable - device_weights - activations) // device_page - 1, 0)
        longest = min(
            longest_sequence(windows, number, config.block_size, ahead), model.max_model_len
        )
    declared = decoder.declare(model)
    return Plan(
        architecture=model.architecture,
        dtype=dtype.name,
        devices=size,
        max_model_len=config.max_model_len,
        parameters=sum(param.size for param in declared.values()),
        weights=model_params.num_bytes(declared, dtype),
        device_weights=device_weights,
        device_activations=activations,
        token=kv_cache.bytes_per_token(split, dtype),
        device_page=device_page,
        tables=len(windows),
        block_size=config.block_size,
        sequence_pages=most_pages(windows, config.max_model_len, config.block_size, ahead),
        device_memory=usable,
        pages=number,
        longest=longest,
    )
