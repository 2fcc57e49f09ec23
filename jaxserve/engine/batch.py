"""The door: turns a decision into one packed int32 array of fixed shape, and back on the device.

This is the only code that knows the layout of that array. Everything the device needs for a step
travels in it, sampling settings included: they are a few words per lane, and one upload costs the
same whether it holds ten kilobytes or forty.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.decision import Decision
from jaxserve.engine.page_allocator import PADDING_PAGE
from jaxserve.engine.request import Request
from jaxserve.model.inputs import StepInputs
from jaxserve.sampling.inputs import SamplingInputs
from jaxserve.sampling.params import MAX_STOP_TOKEN_IDS, SamplingParams
from jaxserve.sampling.sample import VARIANTS, Variant
from pallas_kernels.paged_attention import (
    AttentionBatch,
    PlanSizes,
    plan_decode,
    plan_sizes,
    plan_tiles,
)

MAX_FORBIDDEN = MAX_STOP_TOKEN_IDS + 8
"""Tokens that a lane can rule out: its stop ids and the model's end tokens."""

FLOAT_WORDS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""Sampling settings that travel as the bits of a float32."""

SETTINGS = (*FLOAT_WORDS, "top_k", "seed_high", "seed_low", "edited")
"""The words of a row's sampling settings."""


class Field(NamedTuple):
    """A part of a packed array: its words, and their shape."""

    words: slice
    shape: tuple[int, ...]


Fields = dict[str, Field]
"""The parts of a packed array by name, one behind the other."""


@dataclass(frozen=True)
class Bucket:
    """The fixed shape of a compiled step.

    Attributes:
        lanes: most requests in the step.
        tokens: most tokens; equal to ``lanes`` in a bucket for decoding only.
        context: tokens of a request up to which the step is worth it; None for any.
    """

    lanes: int
    tokens: int
    context: int | None = None

    @property
    def decode_only(self) -> bool:
        """Whether each lane has at most one token."""
        return self.tokens == self.lanes

    def fits(self, lanes: int, tokens: int, context: int = 0) -> bool:
        """Whether a step of this size fits (one token a lane if ``tokens == lanes``), whose longest
        request has ``context`` tokens."""
        enough = lanes <= self.lanes and tokens <= self.tokens
        short = self.context is None or context <= self.context
        return enough and short and (tokens == lanes or not self.decode_only)


@dataclass(frozen=True)
class Layout:
    """Where each field of a bucket's packed array lies.

    Attributes:
        bucket: the bucket.
        page_size: tokens per page.
        rows: rows of device state.
        windows: of each page table of the model, the sliding window of its layers.
        plan: sizes of the attention plans.
    """

    bucket: Bucket
    page_size: int
    rows: int
    windows: tuple[int | None, ...]
    plan: PlanSizes

    @classmethod
    def make(
        cls,
        bucket: Bucket,
        page_size: int,
        rows: int,
        group: int,
        split: bool,
        places: int | None = None,
        windows: tuple[int | None, ...] = (None,),
    ) -> Layout:
        """The layout for a model whose widest GQA group is ``group``; see ``plan_sizes``."""
        sizes = plan_sizes(bucket.lanes, bucket.tokens, group, split, places)
        return cls(bucket, page_size, rows, windows, sizes)

    @functools.cached_property
    def tables(self) -> int:
        """Page tables of the model."""
        return len(self.windows)

    @functools.cached_property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """The windows that the step has a plan of decode items for."""
        return tuple(dict.fromkeys(self.windows))

    @functools.cached_property
    def num_table_updates(self) -> int:
        """Page-table cells that one step can write."""
        return self.tables * (self.bucket.lanes + self.bucket.tokens // self.page_size)

    @functools.cached_property
    def sampling_fields(self) -> Fields:
        """The fields that the sampler reads; they depend on the number of lanes only."""
        lanes = self.bucket.lanes
        return _in_a_row(
            dict.fromkeys(("sample_row", "output_index"), (lanes,)),
            {"settings": (len(SETTINGS), lanes), "forbidden": (lanes, MAX_FORBIDDEN)},
        )

    @functools.cached_property
    def fields(self) -> Fields:
        """Every field, in order; the sampler's come first."""
        lanes, tokens = self.bucket.lanes, self.bucket.tokens
        items, tiles, plans = self.plan.decode_items, self.plan.tiles, len(self.distinct_windows)
        per_lane = ("row", "query_start", "query_len", "kv_len", "rope_length")
        return _in_a_row(
            {name: field.shape for name, field in self.sampling_fields.items()},
            dict.fromkeys(per_lane, (lanes,)),
            dict.fromkeys(("decode_first", "decode_count"), (plans, lanes)),
            dict.fromkeys(("decode_lane", "decode_start", "decode_end"), (plans, items)),
            dict.fromkeys(("tile_lane", "tile_start"), (tiles,)),
            dict.fromkeys(("token_ids", "token_lane"), (tokens,)),
            {"table_updates": (self.num_table_updates, 3)},
        )

    @property
    def size(self) -> int:
        """Words of the packed array."""
        return self.fields["table_updates"].words.stop

    @property
    def sampling_size(self) -> int:
        """Words of its first part, the sampler's."""
        return self.sampling_fields["forbidden"].words.stop


def _in_a_row(*groups: dict[str, tuple[int, ...]]) -> Fields:
    """Fields of these shapes, one behind the other."""
    fields, end = {}, 0
    for name, shape in (item for group in groups for item in group.items()):
        start, end = end, end + math.prod(shape)
        fields[name] = Field(slice(start, end), shape)
    return fields


def split_fields(packed: Any, fields: Fields) -> dict[str, Any]:
    """The fields of a packed array, numpy (as views) or JAX."""
    return {
        name: packed[words] if len(shape) == 1 else packed[words].reshape(shape)
        for name, (words, shape) in fields.items()
    }


class Packer:
    """Packs decisions; keeps each row's sampling settings, written when the row changes hands."""

    def __init__(self, rows: int) -> None:
        self._settings = np.zeros((len(SETTINGS), rows), np.int32)
        self._variant = np.zeros(rows, np.int32)
        self._min_tokens = np.zeros(rows, np.int32)
        self._reads_prompt = np.zeros(rows, bool)
        self._forbidden = np.zeros((rows, MAX_FORBIDDEN), np.int32)

    def enter_new_rows(self, decision: Decision) -> None:
        """Writes the settings of the rows that changed hands; comes before all else."""
        for lane in range(decision.num_lanes - decision.num_new_rows, decision.num_lanes):
            self._enter(decision.row[lane], decision.requests[lane])

    def variant(self, decision: Decision) -> Variant:
        """The least sampler that does what every request of a step asks."""
        return VARIANTS[self._variant[decision.row].max()]

    def lanes_that_read_prompts(self, decision: Decision) -> np.ndarray:
        """Lanes, int32 [n], whose requests asked for something of their prompt's hidden states."""
        return self._reads_prompt[decision.row].nonzero()[0]

    def pack(self, layout: Layout, decision: Decision, table_updates: np.ndarray) -> np.ndarray:
        """The packed array int32 [layout.size] of a decision that fits the layout's bucket.

        Args:
            table_updates: int32 [n, 3] of (row, column, page), n <= layout.num_table_updates.
        """
        packed = np.zeros(layout.size, np.int32)
        fields = split_fields(packed, layout.fields)
        lengths, lanes = decision.num_scheduled_tokens, decision.num_lanes
        tokens = decision.num_tokens
        fields["token_lane"][tokens:] = -1
        fields["token_lane"][:tokens] = np.arange(lanes).repeat(lengths)
        fields["token_ids"][:tokens] = decision.token_ids
        kv_len = decision.start + lengths
        fields["row"][:lanes] = decision.row
        fields["query_start"][:lanes] = lengths.cumsum() - lengths
        fields["query_len"][:lanes] = lengths
        fields["kv_len"][:lanes] = kv_len
        fields["rope_length"][:lanes] = decision.rope_length
        for name, array in plan_tiles(lengths, kv_len, layout.plan).items():
            fields[name][:] = array
        for number, window in enumerate(layout.distinct_windows):
            for name, array in plan_decode(lengths, kv_len, layout.plan, window).items():
                fields[name][number] = array
        cells = padded_updates(table_updates, layout.num_table_updates, layout.tables * layout.rows)
        fields["table_updates"][:] = cells
        self._pack_sampling(fields, decision, layout.rows)
        return packed

    def _pack_sampling(self, fields: dict[str, Any], decision: Decision, num_rows: int) -> None:
        row, lanes = decision.row, decision.num_lanes
        fields["sample_row"][:] = num_rows
        fields["sample_row"][:lanes][decision.samples] = row[decision.samples]
        fields["output_index"][:lanes] = decision.output_index
        fields["settings"][:, :lanes] = self._settings.take(row, axis=1)
        fields["forbidden"][:] = -1
        early = (decision.output_index < self._min_tokens[row]).nonzero()[0]
        fields["forbidden"][early] = self._forbidden[row[early]]

    def _enter(self, row: int, request: Request) -> None:
        params = request.params
        floats = np.array([getattr(params, name) for name in FLOAT_WORDS], np.float32)
        seed = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
        words = floats.view(np.int32), params.top_k, seed.view(np.int32), params.has_edits
        self._settings[:, row] = np.hstack(words)
        self._variant[row] = VARIANTS.index(_variant(params))
        self._min_tokens[row] = params.min_tokens
        self._reads_prompt[row] = request.reads_prompt
        # One that finds no place may be chosen, but doesn't end the output either.
        ids = sorted(request.stop_token_ids)[:MAX_FORBIDDEN]
        self._forbidden[row] = ids + [-1] * (MAX_FORBIDDEN - len(ids))


def _variant(params: SamplingParams) -> Variant:
    """The least sampler that does what a request asks."""
    if params.logprobs is not None or params.has_edits:
        return "full"
    plain = params.greedy and not params.has_penalties and not params.min_tokens
    return "greedy" if plain else "sample"


def padded_updates(updates: np.ndarray, count: int, rows: int) -> np.ndarray:
    """Page-table cells int32 [count, 3]; those added go to the row behind all ``rows``."""
    padded = np.full((count, 3), rows, np.int32)
    padded[: len(updates)] = updates
    return padded


# --- on the device ------------------------------------------------------------------------------


def write_table(page_table: jax.Array, updates: jax.Array) -> jax.Array:
    """The page tables [tables * rows, columns] with (row, column, page) cells entered."""
    return page_table.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")


def unpack_inputs(
    layout: Layout, packed: jax.Array, page_table: jax.Array, last_token: jax.Array
) -> tuple[StepInputs, jax.Array]:
    """The model's inputs from a packed array, and the updated page tables."""
    fields = split_fields(packed, layout.fields)
    page_table = write_table(page_table, fields["table_updates"])
    real = fields["token_lane"] >= 0
    lane = jnp.maximum(fields["token_lane"], 0)
    row = fields["row"][lane]
    place = jnp.arange(layout.bucket.tokens)
    start = fields["kv_len"] - fields["query_len"]
    position = jnp.where(real, place - fields["query_start"][lane] + start[lane], 0)
    unknown = fields["token_ids"] < 0  # chosen by the step before: only the device knows it yet
    token_ids = jnp.where(unknown, last_token[row], fields["token_ids"])
    tables = page_table.reshape(layout.tables, layout.rows, -1)
    page = tables[:, row, position // layout.page_size]
    last = jnp.maximum(fields["query_start"] + fields["query_len"] - 1, 0)
    inputs = StepInputs(
        token_ids=token_ids,
        positions=position,
        rope_lengths=fields["rope_length"][lane],
        write_page=jnp.where(real, page, PADDING_PAGE),
        write_slot=position % layout.page_size,
        sample_index=None if layout.bucket.decode_only else last,
        page_table=tables,
        attention=_attention(layout, fields),
    )
    return inputs, page_table


def _attention(layout: Layout, fields: dict[str, Any]) -> AttentionBatch:
    """The attention batch, whose ``decode_*`` arrays are those of every page table."""
    arrays = {n: fields[n] for n in AttentionBatch.__dataclass_fields__.keys() & fields.keys()}
    plans = [layout.distinct_windows.index(window) for window in layout.windows]
    for name in AttentionBatch.PLANNED:
        arrays[name] = jnp.stack([arrays[name][number] for number in plans])
    return AttentionBatch(**arrays, tile_tokens=layout.plan.tile_tokens)


def unpack_sampling(layout: Layout, words: jax.Array) -> SamplingInputs:
    """The sampler's inputs from the first ``layout.sampling_size`` words of a packed array."""
    fields = split_fields(words, layout.sampling_fields)
    settings = dict(zip(SETTINGS, fields["settings"]))
    seed = jnp.stack([settings["seed_high"], settings["seed_low"]], axis=1)
    row = fields["sample_row"]
    return SamplingInputs(
        row=row,
        output_index=fields["output_index"],
        top_k=settings["top_k"],
        seed=jax.lax.bitcast_convert_type(seed, jnp.uint32),
        forbidden=fields["forbidden"],
        edited=jnp.where(settings["edited"] > 0, row, layout.rows),
        **{name: jax.lax.bitcast_convert_type(settings[name], jnp.float32) for name in FLOAT_WORDS},
    )
