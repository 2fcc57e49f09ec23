"""The programs of a step, and the state that passes from step to step on the devices.

``forward`` makes a step, to the likeliest tokens; where somebody wants others, ``sample`` chooses
anew from its logits, with the sampler's part of the packed inputs, which it hands on. What a step
chose is kept until the host reads it, but no output of ``forward`` may be (see ``Runner``), so
``copy_tokens`` copies its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.distributed import TENSOR
from jaxserve.engine import batch, prompt_reads
from jaxserve.engine.batch import Bucket, Layout
from jaxserve.engine.lowered import LoweredPrograms, register
from jaxserve.model import decoder, kv_cache
from jaxserve.model.config import ModelConfig
from jaxserve.model.kv_cache import KVCache
from jaxserve.sampling import edits
from jaxserve.sampling.sample import (
    SAMPLERS,
    VARIANTS,
    Sampled,
    SamplerState,
    Variant,
    count_tokens,
    sample,
)
from pallas_kernels.dispatch import CHOOSE, Kernels

COUNT_PIECE = 512
"""Tokens that one call of ``count_tokens`` enters."""
TABLE_PIECE = 1024
"""Page-table cells that one call of ``write_table`` enters."""

Avals = dict[str, jax.ShapeDtypeStruct]
WHOLE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """What lives on the devices between steps, besides the weights.

    Attributes:
        cache: the KV pages.
        page_table: int32 [tables * rows, pages], all page tables one below the other.
        sampler: see SamplerState.
    """

    cache: KVCache
    page_table: jax.Array
    sampler: SamplerState


register(StepState, SamplerState, Sampled)


def chooser(lanes: int, variant: Variant) -> Hashable:
    """The key of the program that gives what a step chose."""
    return ("sample", lanes, variant) if variant in SAMPLERS else ("copy_tokens", lanes)


class StepPrograms:
    """Lowers the programs of one model on one mesh; holds shapes only, no arrays.

    ``forward`` takes the weights as a tuple, in the order of ``params``: to sort their names would
    take a tenth of its launch.

    Args:
        model: as split by ``for_tensor_parallel``.
        params: shapes and shardings of its weights.
        mesh: the devices.
        layouts: the buckets' layouts, smallest bucket first.
        num_pages: KV pages, the padding page included.
        max_pages: most pages of a request.
        kernels: implementations to use in the forward pass.
        cache_dir: where compiled programs are kept between runs, and these with them; None if
            they aren't.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Avals,
        mesh: Mesh,
        layouts: Mapping[Bucket, Layout],
        num_pages: int,
        max_pages: int,
        kernels: Kernels = CHOOSE,
        cache_dir: str | None = None,
    ) -> None:
        if any(callable(kernel) for kernel in vars(kernels).values()):
            cache_dir = None  # nobody knows what such a function depends on
        self._lowered = LoweredPrograms(cache_dir, mesh, model, layouts, kernels)
        self._kernels = kernels
        self._model, self._params, self._mesh, self._layouts = model, params, mesh, layouts
        self._specs = {path: _spec(aval) for path, aval in params.items()}
        vocab_split = self._specs["embed/tokens"] == PartitionSpec(TENSOR, None)
        self._logits_spec = PartitionSpec(None, TENSOR if vocab_split else None)
        layout = next(iter(layouts.values()))
        dtype = params["embed/tokens"].dtype
        self.state = StepState(
            cache=kv_cache.shapes(model, num_pages, layout.page_size, dtype, mesh),
            page_table=self._int32(layout.tables * layout.rows, max_pages),
            sampler=SamplerState(
                last_token=self._int32(layout.rows),
                counts=self._int32(layout.rows, model.vocab_size, spec=self._logits_spec),
                edits=self._int32(layout.rows, edits.line_size(model.vocab_size)),
            ),
        )

    def lowerings(self) -> dict[Hashable, Callable[[], jax.stages.Lowered]]:
        """Every program that can be needed, most urgent first."""
        programs: dict[Hashable, Callable[[], jax.stages.Lowered]] = {}
        urgent = list(self.urgent_keys())
        for bucket in self._layouts:
            programs["forward", bucket] = functools.partial(self._lower_forward, bucket)
            for variant in VARIANTS:
                lower = functools.partial(self._lower_sample, bucket, variant)
                if variant == "greedy":
                    lower = functools.partial(self._lower_copy_tokens, bucket)
                programs[chooser(bucket.lanes, variant)] = lower
        programs["count_tokens",] = self._lower_count_tokens
        programs["write_table",] = self._lower_write_table
        programs["write_edits",] = self._lower_write_edits
        order = urgent + [key for key in programs if key not in urgent]
        return {key: programs[key] for key in order}

    def lowerings_on_demand(self) -> dict[Hashable, Callable[[], jax.stages.Lowered]]:
        """Programs that only requests for prompt logprobs or embeddings need; the first of those
        waits until they are compiled."""
        return {
            ("forward_with_hidden",): functools.partial(self._lower_forward, self.largest, True),
            ("score_prompt",): self._lower_score_prompt,
            ("pool_prompt",): self._lower_pool_prompt,
        }

    def urgent_keys(self) -> Iterable[Hashable]:
        """One decoding bucket and one for prompts: with them, some request can be served."""
        mixed = next(bucket for bucket in self._layouts if not bucket.decode_only)
        # Not one for some requests only, which is one more.
        every = (bucket for bucket in self._layouts if bucket.context is None)
        for bucket in (mixed, next(bucket for bucket in every if bucket.decode_only)):
            yield ("forward", bucket)
            yield chooser(bucket.lanes, "greedy")
            yield chooser(bucket.lanes, "sample")

    def _lower_forward(self, bucket: Bucket, hidden: bool = False) -> jax.stages.Lowered:
        layout, model, kernels = self._layouts[bucket], self._model, self._kernels
        function = decoder.forward_with_hidden if hidden else decoder.forward
        more = (WHOLE,) if hidden else ()

        def run(params, cache, inputs):
            *outputs, cache = function(model, params, cache, inputs, kernels)
            return cache, *outputs

        if self._mesh.size > 1:
            cache = kv_cache.partitions(model)
            run = jax.shard_map(
                run,
                mesh=self._mesh,
                in_specs=(self._specs, cache, WHOLE),
                out_specs=(cache, self._logits_spec, *more),
                check_vma=False,
            )

        def forward(weights, state, packed):
            params = dict(zip(self._params, weights, strict=True))
            last_token, words = state.sampler.last_token, packed[: layout.sampling_size]
            inputs, table = batch.unpack_inputs(layout, packed, state.page_table, last_token)
            cache, logits, *states = run(params, state.cache, inputs)
            wanted = batch.unpack_sampling(layout, words)
            sampler, sampled = sample("greedy", logits, state.sampler, wanted)
            return StepState(cache, table, sampler), sampled.tokens, logits, words, *states

        whole = NamedSharding(self._mesh, WHOLE)
        outputs = (_shardings(self.state), whole, self._logits(bucket).sharding, whole)
        shardings = (*outputs, *(whole for _ in more))
        avals = tuple(self._params.values()), self.state, self._int32(layout.size)
        key = ("forward_with_hidden" if hidden else "forward", bucket)
        return self._lowered.lower(key, forward, *avals, donate_argnums=1, out_shardings=shardings)

    def _lower_copy_tokens(self, bucket: Bucket) -> jax.stages.Lowered:
        whole = NamedSharding(self._mesh, WHOLE)
        tokens = self._int32(bucket.lanes)
        return self._lowered.lower(("copy_tokens",), jnp.copy, tokens, out_shardings=whole)

    def _lower_sample(self, bucket: Bucket, variant: Variant) -> jax.stages.Lowered:
        # All buckets with as many lanes share the program: the sampler's words are the same.
        layout, state = self._layouts[bucket], self.state.sampler

        def step(logits, state, words):
            return sample(variant, logits, state, batch.unpack_sampling(layout, words))

        shardings = (_shardings(state), NamedSharding(self._mesh, WHOLE))
        avals = self._logits(bucket), state, self._int32(layout.sampling_size)
        key = "sample", bucket.lanes, variant
        return self._lowered.lower(key, step, *avals, donate_argnums=1, out_shardings=shardings)

    def _lower_count_tokens(self) -> jax.stages.Lowered:
        def count(counts, packed):
            ids, of_prompt = packed[:COUNT_PIECE], packed[COUNT_PIECE : 2 * COUNT_PIECE] == 1
            return count_tokens(counts, packed[-2], ids, of_prompt, packed[-1] == 1)

        counts = self.state.sampler.counts
        avals = counts, self._int32(2 * COUNT_PIECE + 2)
        return self._lower_update("count_tokens", count, *avals)

    def _lower_write_table(self) -> jax.stages.Lowered:
        table = self.state.page_table
        return self._lower_update(
            "write_table", batch.write_table, table, self._int32(TABLE_PIECE, 3)
        )

    def _lower_write_edits(self) -> jax.stages.Lowered:
        table = self.state.sampler.edits

        def write(table, packed):
            return edits.write(table, packed[0], packed[1:])

        return self._lower_update("write_edits", write, table, self._int32(1 + table.shape[1]))

    def _lower_update(self, name: str, function: Callable, *avals: Any) -> jax.stages.Lowered:
        """A program that changes its first argument."""
        options = {"donate_argnums": 0, "out_shardings": avals[0].sharding}
        return self._lowered.lower((name,), function, *avals, **options)

    def _lower_score_prompt(self) -> jax.stages.Lowered:
        path = decoder.head_weight(self._model)
        score = functools.partial(prompt_reads.score, self._model)
        piece = self._int32(2, prompt_reads.piece_size(self.largest.lanes))
        avals = {path: self._params[path]}, self._hidden, piece
        whole = NamedSharding(self._mesh, WHOLE)
        return self._lowered.lower(("score_prompt",), score, *avals, out_shardings=whole)

    def _lower_pool_prompt(self) -> jax.stages.Lowered:
        avals = self._hidden, self._int32(2, self.largest.lanes)
        whole = NamedSharding(self._mesh, WHOLE)
        return self._lowered.lower(("pool_prompt",), prompt_reads.pool, *avals, out_shardings=whole)

    @property
    def largest(self) -> Bucket:
        """The bucket that any step fits."""
        return list(self._layouts)[-1]

    @property
    def _hidden(self) -> jax.ShapeDtypeStruct:
        """The final hidden states of a step in the largest bucket."""
        shape = (self.largest.tokens, self._model.embedding_size)
        sharding = NamedSharding(self._mesh, WHOLE)
        return jax.ShapeDtypeStruct(shape, self._params["embed/tokens"].dtype, sharding=sharding)

    def _logits(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        shape = (bucket.lanes, self._model.vocab_size)
        sharding = NamedSharding(self._mesh, self._logits_spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def _int32(self, *shape: int, spec: PartitionSpec = WHOLE) -> Any:
        sharding = NamedSharding(self._mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def _shardings(avals: Any) -> Any:
    return jax.tree.map(lambda aval: aval.sharding, avals)


def _spec(aval: jax.ShapeDtypeStruct) -> PartitionSpec:
    assert isinstance(aval.sharding, NamedSharding)
    return aval.sharding.spec
