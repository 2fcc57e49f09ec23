"""Owns the weights, the KV cache and the compiled programs; carries out decisions on the devices.

Two programs make a step: ``forward``, to the logits of the sampled tokens, and ``sample``. Both are
compiled per bucket, ahead of time, with fixed shapes; state passes from step to step on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ResolvedConfig
from jaxserve.distributed import TENSOR
from jaxserve.engine import batch
from jaxserve.engine.batch import Bucket, Layout, Packer
from jaxserve.engine.programs import Programs, Progress
from jaxserve.engine.request import Decision, SampledToken, ScheduledRequest, TokenLogprobs
from jaxserve.engine.stats import Stats
from jaxserve.model import decoder, kv_cache
from jaxserve.model.config import ModelConfig
from jaxserve.model.params import Params
from jaxserve.sampling.sample import (
    VARIANTS,
    Sampled,
    SamplerState,
    Variant,
    count_tokens,
    sample,
)

COUNT_PIECE = 512
"""Tokens that one call of ``count_tokens`` enters."""
TABLE_PIECE = 1024
"""Page-table cells that one call of ``write_table`` enters."""


@dataclass(frozen=True)
class StepHandle:
    """A dispatched step: its decision, and its results once the launching thread has them: what
    was sampled, or if nothing was, the logits to wait for."""

    decision: Decision
    results: Future[Sampled | jax.Array]


class Runner:
    """Computes the steps of one model on one mesh.

    Args:
        config: resolved.
        model: as split by ``for_tensor_parallel``.
        params: its weights, sharded over ``mesh``.
        mesh: the devices.
        num_pages: KV pages, the padding page included.
        buckets: step shapes, smallest first.
        stats: counters to keep.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model: ModelConfig,
        params: Params,
        mesh: Mesh,
        num_pages: int,
        buckets: Sequence[Bucket],
        stats: Stats,
    ) -> None:
        self._model, self._mesh, self._stats = model, mesh, stats
        self._rows = config.max_num_seqs
        self._page_size = config.block_size
        self._specs = {path: _spec(array) for path, array in params.items()}
        self._params: Params | None = params
        group = max(s.attention.num_heads // s.attention.num_kv_heads for s in model.layers)
        split = jax.default_backend() != "cpu"
        self._layouts = {
            bucket: Layout.make(bucket, self._page_size, self._rows, group, split)
            for bucket in buckets
        }
        self._packer = Packer(self._rows)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        vocab_split = self._specs["embed/tokens"] == PartitionSpec(TENSOR, None)
        self._logits_spec = PartitionSpec(None, TENSOR if vocab_split else None)
        dtype = params["embed/tokens"].dtype
        self._cache = kv_cache.allocate(model, num_pages, self._page_size, dtype, mesh)
        longest = -(-config.max_model_len // config.block_size)
        self._table = jnp.zeros((self._rows, longest), jnp.int32, device=self._replicated)
        self._state = SamplerState(
            last_token=jnp.zeros(self._rows, jnp.int32, device=self._replicated),
            counts=jnp.zeros(
                (self._rows, model.vocab_size),
                jnp.int32,
                device=NamedSharding(mesh, self._logits_spec),
            ),
        )
        # Taken now: the arrays themselves pass on and on while programs are still being lowered.
        self._state_avals = _avals(self._state)
        self._forward_avals = _avals((params, self._cache, self._table, self._state.last_token))
        self.programs = Programs(self._lowerings(), stats)
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-launch")

    def warm_up(self, wait_for_all: bool, progress: Progress | None = None) -> None:
        """Compiles every program in the background; waits for all, or for enough to serve."""
        self.programs.start()
        if wait_for_all:
            self.programs.wait(progress)
            return
        for key in self._urgent_keys():
            self.programs.get(key)

    def dispatch(self, decision: Decision) -> StepHandle:
        """Starts a step on the devices without waiting for it."""
        scheduled = decision.scheduled
        num_tokens = decision.num_tokens
        bucket, variant = self._choose(len(scheduled), num_tokens, _variant(scheduled))
        layout = self._layouts[bucket]
        updates = batch.table_updates(decision)
        early = [
            updates[start : start + TABLE_PIECE]
            for start in range(0, len(updates) - layout.num_table_updates, TABLE_PIECE)
        ]
        packed = self._packer.pack(layout, decision, updates[len(early) * TABLE_PIECE :])
        counted = [
            piece
            for item in scheduled
            if item.new_row and item.request.params.has_penalties
            for piece in _count_pieces(item)
        ]
        forward = self.programs.get(("forward", bucket))
        samples = any(item.samples for item in scheduled)
        sample = self.programs.get(("sample", bucket.lanes, variant)) if samples else None
        self._stats.steps += 1
        self._stats.scheduled_tokens += num_tokens
        self._stats.padded_tokens += bucket.tokens
        results = self._launcher.submit(self._launch, forward, sample, packed, early, counted)
        return StepHandle(decision, results)

    def _launch(
        self,
        forward: jax.stages.Compiled,
        sample: jax.stages.Compiled | None,
        packed: np.ndarray,
        early_updates: Sequence[np.ndarray],
        counted: Sequence[np.ndarray],
    ) -> Sampled | jax.Array:
        """Starts a step's programs. Runs in the launching thread, which alone touches the state:
        starting hundreds of kernels takes a millisecond, in which the scheduler can go on.

        Nothing of a step is kept but what was sampled, so that the next step's buffers get the
        same addresses: a CUDA graph whose addresses change must be patched node by node.
        """
        for updates in early_updates:
            self._write_table(updates)
        for piece in counted:
            count = self.programs.get(("count_tokens",))
            counts = count(self._state.counts, jax.device_put(piece, self._replicated))
            self._state = SamplerState(self._state.last_token, counts)
        self._cache, self._table, logits, words = forward(
            self._params,
            self._cache,
            self._table,
            self._state.last_token,
            jax.device_put(packed, self._replicated),
        )
        if sample is None:
            return logits
        self._state, sampled = sample(logits, self._state, words)
        jax.tree.map(lambda array: array.copy_to_host_async(), sampled)
        return sampled

    def collect(self, handle: StepHandle) -> list[SampledToken | None]:
        """Waits for a step; its token for each scheduled request that sampled."""
        scheduled = handle.decision.scheduled
        results = handle.results.result()
        if not isinstance(results, Sampled):
            results.block_until_ready()
            return [None] * len(scheduled)
        sampled = jax.tree.map(np.asarray, results)
        tokens = sampled.tokens.tolist()
        return [
            SampledToken(tokens[lane], _logprobs(item, lane, sampled)) if item.samples else None
            for lane, item in enumerate(scheduled)
        ]

    def close(self) -> None:
        """Frees the cache and the programs; the weights, if nobody else holds them."""
        self._launcher.shutdown()
        self.programs.close()
        for array in jax.tree.leaves((self._cache, self._table, self._state)):
            array.delete()
        self._params = None

    # --- dispatching --------------------------------------------------------------------------

    def _choose(self, lanes: int, tokens: int, variant: Variant) -> tuple[Bucket, Variant]:
        """The smallest bucket that fits and the least sampler that does, of those compiled."""
        fitting = [bucket for bucket in self._layouts if bucket.fits(lanes, tokens)]
        able = VARIANTS[VARIANTS.index(variant) :]
        for bucket in fitting:
            if self.programs.ready(("forward", bucket)):
                for better in able:
                    if self.programs.ready(("sample", bucket.lanes, better)):
                        return bucket, better
        return fitting[0], variant

    def _write_table(self, updates: np.ndarray) -> None:
        padded = np.full((TABLE_PIECE, 3), self._rows, np.int32)
        padded[: len(updates)] = updates
        padded = jax.device_put(padded, self._replicated)
        self._table = self.programs.get(("write_table",))(self._table, padded)

    # --- programs -----------------------------------------------------------------------------

    def _urgent_keys(self) -> Iterable[Hashable]:
        """One decoding bucket and one for prompts: with them, some request can be served."""
        mixed = next(bucket for bucket in self._layouts if not bucket.decode_only)
        for bucket in (mixed, next(iter(self._layouts))):
            yield ("forward", bucket)
            yield ("sample", bucket.lanes, "sample")  # it does greedy lanes too

    def _lowerings(self) -> dict[Hashable, Any]:
        """Every program that can be needed, most urgent first."""
        lowerings: dict[Hashable, Any] = {}
        urgent = list(self._urgent_keys())
        for bucket in self._layouts:
            lowerings["forward", bucket] = functools.partial(self._lower_forward, bucket)
            for variant in VARIANTS:
                key = ("sample", bucket.lanes, variant)
                lowerings[key] = functools.partial(self._lower_sample, bucket, variant)
        lowerings["count_tokens",] = self._lower_count_tokens
        lowerings["write_table",] = self._lower_write_table
        order = urgent + [key for key in lowerings if key not in urgent]
        return {key: lowerings[key] for key in order}

    def _lower_forward(self, bucket: Bucket) -> jax.stages.Lowered:
        layout, model = self._layouts[bucket], self._model

        def forward(params, cache, page_table, last_token, packed):
            inputs, page_table = batch.unpack_inputs(layout, packed, page_table, last_token)
            logits, cache = decoder.forward(model, params, cache, inputs)
            return cache, page_table, logits, packed[: layout.sampling_size]

        whole = PartitionSpec()
        if self._mesh.size > 1:
            forward = jax.shard_map(
                forward,
                mesh=self._mesh,
                in_specs=(self._specs, kv_cache.PARTITION, whole, whole, whole),
                out_specs=(kv_cache.PARTITION, whole, self._logits_spec, whole),
                check_vma=False,
            )
        cache_sharding = NamedSharding(self._mesh, kv_cache.PARTITION)
        logits_sharding = NamedSharding(self._mesh, self._logits_spec)
        jitted = jax.jit(
            forward,
            donate_argnums=(1, 2),
            out_shardings=(cache_sharding, self._replicated, logits_sharding, self._replicated),
        )
        return jitted.lower(*self._forward_avals, self._int32(layout.size))

    def _lower_sample(self, bucket: Bucket, variant: Variant) -> jax.stages.Lowered:
        # All buckets with as many lanes share the program: the sampler's words are the same.
        layout = self._layouts[bucket]

        def step(logits, state, words):
            return sample(variant, logits, state, batch.unpack_sampling(layout, words))

        logits = jax.ShapeDtypeStruct(
            (bucket.lanes, self._model.vocab_size),
            jnp.float32,
            sharding=NamedSharding(self._mesh, self._logits_spec),
        )
        shardings = jax.tree.map(lambda aval: aval.sharding, self._state_avals)
        jitted = jax.jit(step, donate_argnums=1, out_shardings=(shardings, self._replicated))
        return jitted.lower(logits, self._state_avals, self._int32(layout.sampling_size))

    def _lower_count_tokens(self) -> jax.stages.Lowered:
        def count(counts, packed):
            ids, of_prompt = packed[:COUNT_PIECE], packed[COUNT_PIECE : 2 * COUNT_PIECE] == 1
            return count_tokens(counts, packed[-2], ids, of_prompt, packed[-1] == 1)

        counts = self._state_avals.counts
        jitted = jax.jit(count, donate_argnums=0, out_shardings=counts.sharding)
        return jitted.lower(counts, self._int32(2 * COUNT_PIECE + 2))

    def _lower_write_table(self) -> jax.stages.Lowered:
        jitted = jax.jit(batch.write_table, donate_argnums=0, out_shardings=self._replicated)
        return jitted.lower(self._forward_avals[2], self._int32(TABLE_PIECE, 3))

    def _int32(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._replicated)


def make_buckets(config: ResolvedConfig, platform: str) -> list[Bucket]:
    """The step shapes to compile for a resolved config, smallest first."""
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if platform == "cpu":
        shapes = [(lanes, lanes) for lanes in _powers(1, 4, rows)]
        mixed = [(min(8, rows), min(64, tokens)), (rows, tokens)]
    else:
        shapes = [(lanes, lanes) for lanes in _powers(8, 2, rows)]
        mixed = [(min(8, rows), size) for size in (128, 512) if size < tokens]
        mixed += [(rows, size) for size in _powers(max(512, 2 * rows), 2, tokens)]
    # As many tokens as lanes would mean decoding only.
    shapes += [(lanes, max(size, lanes + 1)) for lanes, size in mixed]
    return sorted({Bucket(*shape) for shape in shapes}, key=lambda b: (b.tokens, b.lanes))


def _powers(start: int, factor: int, last: int) -> list[int]:
    """start, start * factor, ... below ``last``, then ``last``."""
    values = []
    while start < last:
        values.append(start)
        start *= factor
    return [*values, last]


def _avals(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree
    )


def _spec(array: jax.Array) -> PartitionSpec:
    assert isinstance(array.sharding, NamedSharding)
    return array.sharding.spec


def _variant(scheduled: Sequence[ScheduledRequest]) -> Variant:
    """The least sampler that does what every request of the step asks."""
    params = [item.request.params for item in scheduled]
    if any(p.logprobs is not None for p in params):
        return "logprobs"
    plain = all(p.greedy and not p.has_penalties and not p.min_tokens for p in params)
    return "greedy" if plain else "sample"


def _count_pieces(item: ScheduledRequest) -> Iterable[np.ndarray]:
    """A request's tokens so far, packed for the program ``count_tokens``."""
    ids = item.request.token_ids
    for start in range(0, len(ids), COUNT_PIECE):
        piece = ids[start : start + COUNT_PIECE]
        packed = np.full(2 * COUNT_PIECE + 2, -1, np.int32)
        packed[: len(piece)] = piece
        places = start + np.arange(COUNT_PIECE)
        packed[COUNT_PIECE : 2 * COUNT_PIECE] = places < item.request.num_prompt_tokens
        packed[-2:] = item.row, start == 0
        yield packed


def _logprobs(item: ScheduledRequest, lane: int, sampled: Sampled) -> TokenLogprobs | None:
    wanted = item.request.params.logprobs
    if wanted is None:
        return None
    assert sampled.logprobs is not None  # the step's variant is "logprobs" if anybody wants them
    assert sampled.top_tokens is not None and sampled.rank is not None
    values, top = sampled.logprobs[lane], sampled.top_tokens[lane]
    pairs = zip(top[:wanted].tolist(), values[1 : wanted + 1].tolist())
    return TokenLogprobs(
        int(sampled.tokens[lane]), float(values[0]), int(sampled.rank[lane]), tuple(pairs)
    )
