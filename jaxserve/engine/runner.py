"""Owns the weights, the device state and the compiled programs; carries out decisions.

Programs are compiled per bucket, ahead of time, with fixed shapes; see ``step.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ResolvedConfig
from jaxserve.engine import batch, prompt_reads, step
from jaxserve.engine.batch import Bucket, Layout, Packer
from jaxserve.engine.decision import Decision, StepResult
from jaxserve.engine.programs import Programs, Progress, compilation_cache_dir, compiler_options
from jaxserve.engine.prompt_reads import ReadPlan, Reads
from jaxserve.engine.request import Request, TokenLogprobs
from jaxserve.engine.stats import Stats
from jaxserve.engine.step import Avals, StepPrograms, StepState
from jaxserve.model import decoder, one_token
from jaxserve.model.config import AttentionSpec, ModelConfig
from jaxserve.model.params import Params
from jaxserve.sampling import edits
from jaxserve.sampling.sample import SAMPLERS, VARIANTS, Sampled, Variant
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.paged_attention import decode_places


@dataclass(frozen=True)
class StepHandle:
    """A dispatched step: its decision; what it will have sampled; and what it reads of prompts, if
    anything."""

    decision: Decision
    sampled: Sampled
    reads: Reads | None = None


class Runner:
    """Computes the steps of one model on one mesh.

    Args:
        config: resolved.
        model: as split by ``for_tensor_parallel``.
        weights: shapes and shardings of its weights; the arrays come with ``set_params``.
        mesh: the devices.
        num_pages: KV pages, the padding page included.
        buckets: step shapes, smallest first.
        stats: counters to keep.
        kernels: implementations to use in the forward pass.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model: ModelConfig,
        weights: Avals,
        mesh: Mesh,
        num_pages: int,
        buckets: Sequence[Bucket],
        stats: Stats,
        kernels: Kernels = CHOOSE,
    ) -> None:
        self._stats = stats
        self._rows = config.max_num_seqs
        self._vocab_size = model.vocab_size
        self._params: Params | None = None
        self._paths = tuple(weights)
        self._weights: tuple[jax.Array, ...] = ()
        group = max(s.attention.num_heads // s.attention.num_kv_heads for s in model.layers)
        split, windows = jax.default_backend() != "cpu", model.page_groups.windows
        places = _decode_places(model, mesh.size)
        self._layouts = {
            bucket: Layout.make(
                bucket, config.block_size, self._rows, group, split, places, windows
            )
            for bucket in buckets
        }
        max_pages = -(-config.max_model_len // config.block_size)
        self._step = StepPrograms(
            *(model, weights, mesh, self._layouts, num_pages, max_pages, kernels),
            cache_dir=compilation_cache_dir(),
        )
        lowerings, on_demand = self._step.lowerings(), self._step.lowerings_on_demand()
        self.programs = Programs(lowerings, stats, on_demand, compiler_options())
        self._head_weight = decoder.head_weight(model)
        self._packer = Packer(self._rows)
        self._state: StepState | None = None

    def start_compiling(self, everything: bool) -> None:
        """Compiles programs in the background: all, or enough to serve some request."""
        self.programs.start(None if everything else self._step.urgent_keys())

    def warm_up(self, wait_for_all: bool, progress: Progress | None = None) -> None:
        """Waits until every program is compiled, or enough to serve some request."""
        self.start_compiling(wait_for_all)
        if wait_for_all:
            self.programs.wait(progress)
            return
        for key in self._step.urgent_keys():
            self.programs.get(key)

    def set_params(self, params: Params) -> None:
        """Gives it the weights; needed before the first step, but not for compiling."""
        self._params = params
        self._weights = tuple(params[path] for path in self._paths)

    def allocate(self) -> None:
        """Makes the device state, zeroed: 0 times an uninitialised NaN would spoil masked scores.
        What there was before is freed."""
        self._free_state()
        self._state = jax.tree.map(
            lambda aval: jnp.zeros(aval.shape, aval.dtype, device=aval.sharding), self._step.state
        )

    def dispatch(self, decision: Decision) -> StepHandle:
        """Starts a step on the devices without waiting for it."""
        packer = self._packer
        packer.enter_new_rows(decision)
        lanes, num_tokens = decision.num_lanes, decision.num_tokens
        asking = packer.lanes_that_read_prompts(decision)
        plan = prompt_reads.make_plan(decision, asking, self._step.largest.lanes)
        least = packer.variant(decision)
        context, largest = _context(decision), plan is not None
        bucket, variant = self._choose(lanes, num_tokens, least, context, largest)
        layout, updates = self._layouts[bucket], decision.table_updates
        early = []
        while len(updates) > layout.num_table_updates:
            early.append(
                batch.padded_updates(
                    updates[: step.TABLE_PIECE], step.TABLE_PIECE, layout.tables * layout.rows
                )
            )
            updates = updates[step.TABLE_PIECE :]
        packed = packer.pack(layout, decision, updates)
        new = decision.requests[lanes - decision.num_new_rows :]
        edited = [self._edits(request) for request in new if request.params.has_edits]
        counted = [
            piece
            for request in new
            if request.params.has_penalties
            for piece in _count_pieces(request)
        ]
        key = ("forward", bucket) if plan is None else ("forward_with_hidden",)
        forward = self.programs.get(key)
        if not decision.samples.any():
            variant = "greedy"
        choose = self.programs.get(step.chooser(bucket.lanes, variant))
        self._stats.steps += 1
        self._stats.scheduled_tokens += num_tokens
        self._stats.padded_tokens += bucket.tokens
        sampled, hidden = self._launch(forward, choose, variant, packed, early, counted, edited)
        reads = self._read_prompts(plan, hidden[0]) if plan is not None else None
        return StepHandle(decision, sampled, reads)

    def _launch(
        self,
        forward: jax.stages.Compiled,
        choose: jax.stages.Compiled,
        variant: Variant,
        packed: np.ndarray,
        early_updates: Sequence[np.ndarray],
        counted: Sequence[np.ndarray],
        edited: Sequence[np.ndarray],
    ) -> tuple[Sampled, Sequence[jax.Array]]:
        """Starts a step's programs; returns what was sampled, and the hidden states, if ``forward``
        gives them.

        Nothing of a step is kept but what ``choose`` gives, so that the buffers of the next step's
        ``forward`` get the same addresses: a CUDA graph whose addresses change must be patched node
        by node.
        """
        state = self._state
        if state is None:
            raise RuntimeError("the runner has no state; call allocate() first")
        table, sampler = state.page_table, state.sampler
        for updates in early_updates:
            table = self.programs.get(("write_table",))(table, updates)
        for piece in counted:
            counts = self.programs.get(("count_tokens",))(sampler.counts, piece)
            sampler = replace(sampler, counts=counts)
        for words in edited:
            table_of_edits = self.programs.get(("write_edits",))(sampler.edits, words)
            sampler = replace(sampler, edits=table_of_edits)
        state = StepState(state.cache, table, sampler)
        state, tokens, logits, words, *hidden = forward(self._weights, state, packed)
        if variant in SAMPLERS:
            sampler, sampled = choose(logits, state.sampler, words)
            state = replace(state, sampler=sampler)
        else:
            sampled = Sampled(choose(tokens))
        self._state = state
        jax.tree.map(lambda array: array.copy_to_host_async(), sampled)
        return sampled, hidden

    def _read_prompts(self, plan: ReadPlan, hidden: jax.Array) -> Reads:
        """Starts reading what a step's requests want of its hidden states [T, width]."""
        assert self._params is not None
        head = {self._head_weight: self._params[self._head_weight]}
        scores = [
            self.programs.get(("score_prompt",))(head, hidden, piece) for piece in plan.pieces
        ]
        sums = None
        if plan.spans is not None:
            sums = self.programs.get(("pool_prompt",))(hidden, plan.spans)
        return Reads(plan, scores, sums)

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step; what its lanes chose."""
        decision = handle.decision
        reads = prompt_reads.gather(handle.reads) if handle.reads is not None else ()
        sampled = jax.tree.map(np.asarray, handle.sampled)
        token_ids = sampled.tokens[: decision.num_lanes].tolist()
        if sampled.logprobs is None:
            return StepResult(token_ids, None, reads)
        logprobs = [
            _logprobs(request, lane, sampled) if samples else None
            for lane, (request, samples) in enumerate(zip(decision.requests, decision.samples))
        ]
        return StepResult(token_ids, logprobs, reads)

    def close(self) -> None:
        """Frees the cache and the programs; the weights, if nobody else holds them."""
        self.programs.close()
        self._free_state()
        self._params, self._weights = None, ()

    def _free_state(self) -> None:
        """Deletes the arrays, whoever else may hold them: a failed step's traceback does."""
        for array in jax.tree.leaves(self._state):
            array.delete()
        self._state = None

    # --- dispatching --------------------------------------------------------------------------

    def _choose(
        self, lanes: int, tokens: int, variant: Variant, context: int = 0, largest: bool = False
    ) -> tuple[Bucket, Variant]:
        """The smallest bucket that fits (or the largest one, if told so) and the least sampler that
        does, of those compiled."""
        fitting = [bucket for bucket in self._layouts if bucket.fits(lanes, tokens, context)]
        fitting = fitting[-1:] if largest else fitting
        able = VARIANTS[VARIANTS.index(variant) :]
        for bucket in fitting:
            if self.programs.ready(("forward", bucket)):
                for better in able:
                    if self.programs.ready(step.chooser(bucket.lanes, better)):
                        return bucket, better
        return fitting[0], variant

    def _edits(self, request: Request) -> np.ndarray:
        """A request's edits, packed for the program ``write_edits``."""
        line = edits.line(request.params, request.output_token_ids, self._vocab_size)
        return np.concatenate([np.array([request.row], np.int32), line])


def _context(decision: Decision) -> int:
    """Tokens of the longest request in a step."""
    return int((decision.start + decision.num_scheduled_tokens).max(initial=0))


def _decode_places(model: ModelConfig, devices: int) -> int | None:
    """Decode items that run at the same time, in the layers with the most heads to a device; None
    if that is not known."""
    places = [
        decode_places(
            spec.head_size,
            max(1, spec.num_kv_heads // devices),
            spec.num_heads // spec.num_kv_heads,
        )
        for spec in {layer.attention for layer in model.layers}
        if isinstance(spec, AttentionSpec)
    ]
    return min((n for n in places if n is not None), default=None)


def make_buckets(config: ResolvedConfig, platform: str, single: bool = False) -> list[Bucket]:
    """The step shapes to compile for a resolved config, smallest first.

    Args:
        platform: JAX's name of it.
        single: whether an accelerator's steps of one token are to have a shape of their own.
    """
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if platform == "cpu":
        # Every program has to be compiled, and an empty lane costs as much as a full one.
        many = _powers(32, 2, rows)
        shapes = [(lanes, lanes) for lanes in (*_powers(1, 4, min(16, rows)), *many)]
        mixed = [(min(8, rows), min(64, tokens)), (rows, tokens)]
        mixed += [(lanes, 2 * lanes) for lanes in many if 32 <= lanes < tokens / 2]
    else:
        shapes = [(lanes, lanes) for lanes in _powers(8, 2, rows)]
        mixed = [(min(8, rows), size) for size in (128, 512) if size < tokens]
        mixed += [(rows, size) for size in _powers(max(512, 2 * rows), 2, tokens)]
    # As many tokens as lanes would mean decoding only.
    shapes += [(lanes, max(size, lanes + 1)) for lanes, size in mixed]
    buckets = sorted({Bucket(*shape) for shape in shapes}, key=lambda b: (b.tokens, b.lanes))
    if single and platform != "cpu":
        buckets.insert(0, Bucket(1, 1, one_token.MAX_CONTEXT))
    return buckets


def step_sizes(buckets: Sequence[Bucket]) -> list[int]:
    """Tokens that the buckets hold which take prompts of any number of requests, ascending."""
    rows = max(bucket.lanes for bucket in buckets)
    return [b.tokens for b in buckets if b.lanes == rows and not b.decode_only]


def _powers(start: int, factor: int, last: int) -> list[int]:
    """start, start * factor, ... below ``last``, then ``last``."""
    values = []
    while start < last:
        values.append(start)
        start *= factor
    return [*values, last]


def _count_pieces(request: Request) -> Iterable[np.ndarray]:
    """A request's tokens so far, packed for the program ``count_tokens``."""
    ids = request.token_ids
    for start in range(0, len(ids), step.COUNT_PIECE):
        piece = ids[start : start + step.COUNT_PIECE]
        packed = np.full(2 * step.COUNT_PIECE + 2, -1, np.int32)
        packed[: len(piece)] = piece
        places = start + np.arange(step.COUNT_PIECE)
        packed[step.COUNT_PIECE : 2 * step.COUNT_PIECE] = places < request.num_prompt_tokens
        packed[-2:] = request.row, start == 0
        yield packed


def _logprobs(request: Request, lane: int, sampled: Sampled) -> TokenLogprobs | None:
    wanted = request.params.logprobs
    if wanted is None:
        return None
    assert sampled.logprobs is not None  # the step's variant is "full" if anybody wants them
    assert sampled.top_tokens is not None and sampled.rank is not None
    values, top = sampled.logprobs[lane], sampled.top_tokens[lane]
    pairs = zip(top[:wanted].tolist(), values[1 : wanted + 1].tolist())
    return TokenLogprobs(
        int(sampled.tokens[lane]), float(values[0]), int(sampled.rank[lane]), tuple(pairs)
    )
