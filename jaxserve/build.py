"""Puts an engine together from a config and a checkpoint. A composition root."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from converters import Checkpoint, resolve_model
from jaxserve import demo, log
from jaxserve.config import DTYPES, DeviceFacts, EngineConfig, ResolvedConfig
from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
from jaxserve.engine.core import Engine
from jaxserve.engine.memory import GIB, MemoryPlan, check_fits, plan_memory
from jaxserve.engine.page_allocator import PageAllocator
from jaxserve.engine.programs import compile_events, use_compilation_cache
from jaxserve.engine.runner import Runner, make_buckets
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.model import decoder
from jaxserve.model import params as model_params
from jaxserve.model.config import ModelConfig


@dataclass(frozen=True)
class Built:
    """An engine and what it was built of.

    Attributes:
        config: with every size filled in.
        memory: where a device's memory goes.
        runner, engine: the two; ``runner.allocate()`` must come before the first step.
    """

    config: ResolvedConfig
    memory: MemoryPlan
    runner: Runner
    engine: Engine


def find_model(config: EngineConfig) -> Path:
    """The checkpoint's directory, downloaded if need be; the demo model's if none is named."""
    if config.model is None:
        log.logger.info(
            "no model given: loading the embedded demo model, a toy of 5 million parameters."
        )
        return demo.target_path()
    return resolve_model(config.model, config.revision, config.download_dir)


def build(wanted: EngineConfig, checkpoint: Checkpoint, use_tqdm: bool) -> Built:
    """Loads the weights, sizes the cache and puts the engine together; compiles nothing yet.

    Raises:
        ConfigError: the settings don't fit the model or the machine.
        CheckpointError: the weights can't be read.
    """
    # Read by JAX when it first touches the GPU; later it has no effect.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(wanted.gpu_memory_utilization))
    use_compilation_cache(wanted.compilation_cache_dir)
    facts = DeviceFacts(jax.default_backend(), jax.local_device_count())
    config = wanted.resolve(facts, checkpoint.config.max_model_len)
    model = decoder.for_tensor_parallel(checkpoint.config, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size)
    dtype = _dtype(config.dtype, checkpoint.config.dtype, facts.platform)
    tree = decoder.declare(model)
    specs = model_params.partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    if config.load_format == "dummy":
        params = model_params.random_params(tree, dtype, mesh, specs, config.seed)
    else:
        with _loading_bar(use_tqdm) as progress:
            params = checkpoint.load(tree, specs, mesh, dtype, progress)
    jax.block_until_ready(params)
    memory, config = _fit(config, model, dtype, shorten=wanted.max_model_len is None)
    stats = Stats()
    buckets = make_buckets(config, facts.platform)
    runner = Runner(config, model, params, mesh, memory.num_pages, buckets, stats)
    allocator = PageAllocator(memory.num_pages, config.block_size, config.enable_prefix_caching)
    engine = Engine(
        Scheduler(allocator, config.max_num_seqs, config.max_num_batched_tokens, stats),
        runner,
        max_model_len=config.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        dynamic_rope_len=model.dynamic_rope_len,
        seed=config.seed,
        run_ahead=1 if facts.platform == "cpu" else 2,
    )
    return Built(config, memory, runner, engine)


def _fit(
    config: ResolvedConfig, model: ModelConfig, dtype: jnp.dtype, shorten: bool
) -> tuple[MemoryPlan, ResolvedConfig]:
    """Sizes the cache; shortens max_model_len to what fits if the user left it to us."""
    plan = plan_memory(config, model, dtype)
    room = (plan.num_pages - 1) * config.block_size
    if shorten and 0 < room < config.max_model_len:
        log.logger.info("max_model_len=%d, the most that fits: %s.", room, plan)
        config = dataclasses.replace(config, max_model_len=room)
    check_fits(plan, config)
    return plan, config


def _dtype(wanted: str, checkpoint: str, platform: str) -> jnp.dtype:
    """The dtype of weights, activations and cache."""
    name = DTYPES[wanted]
    if name == "auto":
        # CPUs compute float32 fastest; accelerators compute it many times slower than 16 bits.
        name = "bfloat16" if checkpoint == "float32" else checkpoint
        name = "float32" if platform == "cpu" else name
    return jnp.dtype(name)


@contextlib.contextmanager
def _loading_bar(use_tqdm: bool) -> Iterator[Callable[[int, int], None]]:
    with tqdm(
        desc="Loading weights", unit="B", unit_scale=True, disable=not use_tqdm, leave=False
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def warm_up(built: Built, wait_for_all: bool, use_tqdm: bool) -> None:
    """Compiles the programs; see ``Runner.warm_up``.

    Accelerators always wait for all: XLA tries out kernels there, which takes memory that the KV
    cache will fill.
    """
    runner, memory = built.runner, built.memory
    wait_for_all |= jax.default_backend() != "cpu"
    hits_before = compile_events()["cache_hits"]
    disable = not use_tqdm or not wait_for_all
    with tqdm(desc="Compiling", unit="program", disable=disable, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            hits = compile_events()["cache_hits"] - hits_before
            bar.set_postfix_str(f"{hits} from the cache", refresh=False)
            bar.update(done - bar.n)

        runner.warm_up(wait_for_all, progress)
        if wait_for_all and runner.programs.temp_bytes > memory.activations:
            log.logger.warning(
                "the largest step needs %.2f GiB of scratch memory, more than the %.2f GiB set "
                "aside; lower gpu_memory_utilization if it runs out of memory.",
                runner.programs.temp_bytes / GIB,
                memory.activations / GIB,
            )
