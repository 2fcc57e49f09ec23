"""Puts an engine together from a config and a checkpoint. A composition root."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
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
from jaxserve.engine.memory import (
    GIB,
    MemoryPlan,
    check_fits,
    claim_memory,
    plan_memory,
    room_for,
    take_memory,
)
from jaxserve.engine.page_allocator import PageAllocator
from jaxserve.engine.programs import Progress, compile_events, use_compilation_cache
from jaxserve.engine.runner import Runner, make_buckets, step_sizes
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.engine.timeline import Timeline
from jaxserve.kernels import overridden
from jaxserve.model import decoder, one_token
from jaxserve.model import params as model_params
from jaxserve.model.config import ModelConfig
from jaxserve.model.params import Params


@dataclass(frozen=True)
class Built:
    """An engine and what it was built of.

    Attributes:
        config: with every size filled in.
        model: as split over the devices.
        dtype: of weights, activations and cache.
        memory: where a device's memory goes.
        runner, engine: the two; before the first step the runner needs ``load_weights`` and
            ``allocate``.
        load: reads the weights, or makes random ones.
    """

    config: ResolvedConfig
    model: ModelConfig
    dtype: jnp.dtype
    memory: MemoryPlan
    runner: Runner
    engine: Engine
    load: Callable[[Progress], Params]


def find_model(config: EngineConfig) -> Path:
    """The checkpoint's directory, downloaded if need be; the demo model's if none is named."""
    if config.model is None:
        log.logger.info(
            "no model given: loading the embedded demo model, a toy of 5 million parameters."
        )
        return demo.target_path()
    return resolve_model(config.model, config.revision, config.download_dir)


def build(wanted: EngineConfig, checkpoint: Checkpoint, timeline: Timeline) -> Built:
    """Sizes the cache and puts the engine together; neither weights nor programs are there yet.

    Raises:
        ConfigError: the settings don't fit the model or the machine.
    """
    if wanted.trust_remote_code:
        log.logger.info(
            "trust_remote_code has no effect here: the models are jaxserve's own code, and a "
            "checkpoint's is never run."
        )
    fraction = claim_memory(wanted.gpu_memory_utilization)
    use_compilation_cache(wanted.compilation_cache_dir)
    with timeline.stage("device"):
        facts = DeviceFacts(jax.default_backend(), jax.local_device_count())
    config = wanted.resolve(facts, checkpoint.config.max_model_len)
    model = decoder.for_tensor_parallel(checkpoint.config, config.tensor_parallel_size)
    model = dataclasses.replace(model, max_model_len=config.max_model_len)
    mesh = make_mesh(config.tensor_parallel_size)
    dtype = choose_dtype(config.dtype, checkpoint.config.dtype, facts.platform)
    tree = decoder.declare(model)
    specs = model_params.partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    weights = model_params.sharded(tree, dtype, mesh, specs)
    given = 1.0  # allocators of other platforms have all memory
    if facts.platform == "gpu":
        given = fraction
        with timeline.stage("memory"):
            take_memory(mesh.local_devices)
    memory = plan_memory(config, model, weights, mesh, dtype, given)
    if memory.held:
        log.logger.warning(
            "gpu_memory_utilization=%s counts on memory that other processes hold (nvidia-smi "
            "names them): %s.",
            config.gpu_memory_utilization,
            memory,
        )
    windows = model.page_groups.windows
    config = _fit(config, memory, windows, shorten=wanted.max_model_len is None)
    stats = Stats()
    single = config.tensor_parallel_size == 1 and one_token.gains(model, dtype)
    buckets = make_buckets(config, facts.platform, single)
    kernels = overridden(config.kernel_overrides or {}, model, config.block_size, dtype)
    runner = Runner(config, model, weights, mesh, memory.num_pages, buckets, stats, kernels)
    allocator = PageAllocator(memory.num_pages, config.block_size, config.enable_prefix_caching)
    max_tokens, sizes = config.max_num_batched_tokens, step_sizes(buckets)
    engine = Engine(
        Scheduler(
            allocator,
            config.max_num_seqs,
            max_tokens,
            stats,
            sizes,
            windows=windows,
            run_ahead=config.run_ahead,
            long_rope_len=model.long_rope_len,
        ),
        runner,
        max_model_len=config.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        dynamic_rope_len=model.dynamic_rope_len,
        seed=config.seed,
        run_ahead=config.run_ahead,
    )

    def load(progress: Progress) -> Params:
        if config.load_format == "dummy":
            return model_params.random_params(tree, dtype, mesh, specs, config.seed)
        return checkpoint.load(tree, specs, mesh, dtype, progress)

    return Built(config, model, dtype, memory, runner, engine, load)


def _fit(
    config: ResolvedConfig, plan: MemoryPlan, windows: Sequence[int | None], shorten: bool
) -> ResolvedConfig:
    """Checks the plan; shortens max_model_len to what fits if the user left it to us."""
    room = room_for(plan, config, windows)
    if shorten and 0 < room < config.max_model_len:
        log.logger.info("max_model_len=%d, the most that fits: %s.", room, plan)
        config = dataclasses.replace(config, max_model_len=room)
    check_fits(plan, config, windows)
    return config


def choose_dtype(wanted: str, checkpoint: str, platform: str) -> jnp.dtype:
    """The dtype of weights, activations and cache."""
    name = DTYPES[wanted]
    if name == "auto":
        # CPUs compute float32 fastest; accelerators compute it many times slower than 16 bits.
        name = "bfloat16" if checkpoint == "float32" else checkpoint
        name = "float32" if platform == "cpu" else name
    return jnp.dtype(name)


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Tracing makes many objects that stay; to look for garbage among them again and again takes a
    sixth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def start_compiling(built: Built, everything: bool) -> None:
    """Lets background threads begin with the programs, which need no weights: with all of them, or
    those that it takes to serve some request."""
    if not built.config.enforce_eager:
        built.runner.start_compiling(everything)


def allocate(built: Built) -> None:
    """Makes the device state, and goes on with the programs that nobody waited for."""
    built.runner.allocate()
    start_compiling(built, everything=True)


def load_weights(built: Built, use_tqdm: bool, watch: Progress | None = None) -> None:
    """Loads the weights and gives them to the runner; ``watch`` hears of (bytes done, of total).

    Raises:
        CheckpointError: they can't be read.
    """
    with _loading_bar(use_tqdm, watch) as progress:
        built.runner.set_params(jax.block_until_ready(built.load(progress)))


@contextlib.contextmanager
def _loading_bar(use_tqdm: bool, watch: Progress | None) -> Iterator[Progress]:
    with tqdm(
        desc="Loading weights", unit="B", unit_scale=True, disable=not use_tqdm, leave=False
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if watch is not None:
                watch(done, total)

        yield progress


def warm_up(
    built: Built, wait_for_all: bool, use_tqdm: bool, watch: Progress | None = None
) -> None:
    """Compiles the programs, or waits for those that are being compiled; see ``Runner.warm_up``.
    ``watch`` hears of (programs done, of total)."""
    runner, memory = built.runner, built.memory
    hits_before = compile_events()["cache_hits"]
    disable = not use_tqdm or not wait_for_all
    with tqdm(desc="Compiling", unit="program", disable=disable, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            hits = compile_events()["cache_hits"] - hits_before
            bar.set_postfix_str(f"{hits} from the cache", refresh=False)
            bar.update(done - bar.n)
            if watch is not None:
                watch(done, total)

        runner.warm_up(wait_for_all, progress)
        if wait_for_all and runner.programs.temp_bytes > memory.activations:
            log.logger.warning(
                "the largest step needs %.2f GiB of scratch memory, more than the %.2f GiB set "
                "aside; lower gpu_memory_utilization if it runs out of memory.",
                runner.programs.temp_bytes / GIB,
                memory.activations / GIB,
            )
