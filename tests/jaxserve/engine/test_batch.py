"""The packed array: what the host puts in, the device takes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine import batch
from jaxserve.engine.batch import Bucket, Layout, Packer
from jaxserve.engine.decision import Decision
from jaxserve.engine.page_allocator import PADDING_PAGE
from jaxserve.engine.request import Request
from jaxserve.sampling.params import SamplingParams

ROWS, PAGE_SIZE, COLUMNS = 6, 4, 16
DEFAULT = SamplingParams()
LAST_TOKEN = 1000 + np.arange(ROWS, dtype=np.int32)


def layout_of(lanes: int, tokens: int, split: bool = False) -> Layout:
    return Layout.make(Bucket(lanes, tokens), PAGE_SIZE, ROWS, group=2, split=split)


@dataclass(frozen=True)
class Part:
    """A request's part of a step: ``count`` tokens from ``start``, in a row with pages of its own
    (row r has pages 100 r + 1, 100 r + 2, ...)."""

    row: int
    start: int
    count: int
    unknown_last: bool = False
    samples: bool = True
    params: SamplingParams = DEFAULT
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    rope_length: int = 1

    @property
    def token_ids(self) -> list[int]:
        """The scheduled tokens."""
        ids = [10 * self.row + position for position in range(self.start, self.start + self.count)]
        return [*ids[:-1], -1] if self.unknown_last else ids

    @property
    def pages(self) -> list[int]:
        num_pages = -(-(self.start + self.count) // PAGE_SIZE)
        return [100 * self.row + 1 + column for column in range(num_pages)]

    @property
    def request(self) -> Request:
        return Request(
            request_id=str(self.row),
            token_ids=[0],
            params=self.params,
            max_tokens=99,
            stop_token_ids=self.stop_token_ids,
            seed=self.seed,
            row=self.row,
        )


def decision_of(*parts: Part, num_new_rows: int = 0, table_updates: Any = ()) -> Decision:
    """A step of these parts; the last ``num_new_rows`` have a row that changed hands."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(part, name) for part in parts])

    return Decision(
        [part.request for part in parts],
        num_new_rows,
        row=column("row").astype(np.int32),
        start=column("start").astype(np.int32),
        num_scheduled_tokens=column("count").astype(np.int32),
        num_prompt_tokens=np.ones(len(parts), np.int32),
        rope_length=column("rope_length").astype(np.int32),
        num_preemptions=np.zeros(len(parts), np.int32),
        output_index=np.full(len(parts), 3, np.int32),
        samples=column("samples"),
        ends=np.zeros(len(parts), bool),
        token_ids=np.array([token for part in parts for token in part.token_ids], np.int32),
        table_updates=np.array(table_updates, np.int32).reshape(-1, 3),
    )


def pack(packer: Packer, layout: Layout, decision: Decision) -> np.ndarray:
    packer.enter_new_rows(decision)
    return packer.pack(layout, decision, decision.table_updates)


@st.composite
def steps(draw: st.DrawFn, lanes: int, tokens: int) -> list[Part]:
    """Any step that fits a bucket: rows in any order, chunks anywhere."""
    rows = draw(st.permutations(range(ROWS)))[: draw(st.integers(1, min(lanes, ROWS)))]
    left = tokens - len(rows)
    parts = []
    for row in rows:
        more = draw(st.integers(0, left)) if tokens > lanes else 0
        left -= more
        start = draw(st.integers(0, COLUMNS * PAGE_SIZE - more - 1))
        unknown, samples = draw(st.booleans()), draw(st.booleans())
        rope_length = draw(st.integers(1, COLUMNS * PAGE_SIZE))
        part = Part(row, start, 1 + more, unknown, samples, rope_length=rope_length)
        parts.append(part)
    return parts


def full_table(parts: list[Part]) -> np.ndarray:
    """A table in which all pages of a step stand."""
    table = np.zeros((ROWS, COLUMNS), np.int32)
    for part in parts:
        table[part.row, : len(part.pages)] = part.pages
    return table


@pytest.mark.parametrize(("lanes", "tokens"), [(6, 20), (6, 6), (8, 9), (1, 2)])
@given(data=st.data())
@settings(max_examples=40)
def test_the_model_gets_each_token_where_it_belongs(
    lanes: int, tokens: int, data: st.DataObject
) -> None:
    parts = data.draw(steps(lanes, tokens))
    layout = layout_of(lanes, tokens)
    packed = pack(Packer(ROWS), layout, decision_of(*parts))
    inputs, table = batch.unpack_inputs(
        layout, packed, jnp.asarray(full_table(parts)), jnp.asarray(LAST_TOKEN)
    )
    np.testing.assert_array_equal(table, full_table(parts))
    at = 0
    for lane, part in enumerate(parts):
        places = slice(at, at + part.count)
        position = np.arange(part.start, part.start + part.count)
        ids = [LAST_TOKEN[part.row] if token == -1 else token for token in part.token_ids]
        np.testing.assert_array_equal(inputs.token_ids[places], ids)
        np.testing.assert_array_equal(inputs.positions[places], position)
        pages = np.array(part.pages)
        np.testing.assert_array_equal(inputs.write_page[0, places], pages[position // PAGE_SIZE])
        np.testing.assert_array_equal(inputs.write_slot[places], position % PAGE_SIZE)
        np.testing.assert_array_equal(inputs.rope_lengths[places], part.rope_length)
        at += part.count
        sampled = np.arange(tokens) if inputs.sample_index is None else inputs.sample_index
        assert sampled[lane] == at - 1
        attention = inputs.attention
        assert attention.row[lane] == part.row
        assert attention.query_start[lane] == at - part.count
        assert attention.query_len[lane] == part.count
        assert attention.kv_len[lane] == position[-1] + 1
    # What is left over writes to the padding page, attends to nothing and reads nothing unknown.
    np.testing.assert_array_equal(inputs.write_page[0, at:], PADDING_PAGE)
    np.testing.assert_array_equal(inputs.positions[at:], 0)
    np.testing.assert_array_equal(inputs.is_token, np.arange(tokens) < at)
    count = len(parts)
    for name in ("query_len", "kv_len", "decode_count"):
        np.testing.assert_array_equal(getattr(inputs.of_table(0).attention, name)[count:], 0)
    assert inputs.sample_index is None or (np.asarray(inputs.sample_index) < tokens).all()


def test_each_table_has_decode_items_for_what_its_layers_see() -> None:
    windows = (None, 5, None, 5)
    layout = Layout.make(Bucket(4, 4), PAGE_SIZE, ROWS, group=2, split=True, windows=windows)
    parts = [Part(row=2, start=29, count=1), Part(row=0, start=2, count=1)]
    packed = pack(Packer(ROWS), layout, decision_of(*parts))
    table = jnp.zeros((len(windows) * ROWS, COLUMNS), jnp.int32)
    inputs, _ = batch.unpack_inputs(layout, packed, table, jnp.asarray(LAST_TOKEN))
    for number, window in enumerate(windows):
        attention = inputs.of_table(number).attention
        first = 0 if window is None else 30 - window
        np.testing.assert_array_equal(attention.decode_lane[:3], [0, 1, 0])
        np.testing.assert_array_equal(attention.decode_start[:3], [first, 0, 0])
        np.testing.assert_array_equal(attention.decode_end[:3], [30, 3, 0])
        np.testing.assert_array_equal(attention.decode_count, [1, 1, 0, 0])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("lanes", "tokens"), [(1, 1), (4, 4), (6, 20)])
def test_fields_lie_one_behind_the_other(lanes: int, tokens: int, split: bool) -> None:
    layout = layout_of(lanes, tokens, split)
    packed = np.arange(layout.size)
    fields = batch.split_fields(packed, layout.fields)
    words = np.concatenate([field.ravel() for field in fields.values()])
    np.testing.assert_array_equal(words, packed)
    assert list(layout.fields)[: len(layout.sampling_fields)] == list(layout.sampling_fields)
    sampling = batch.split_fields(packed[: layout.sampling_size], layout.sampling_fields)
    for name, field in sampling.items():
        np.testing.assert_array_equal(field, fields[name])


def test_buckets_with_as_many_lanes_share_the_samplers_words() -> None:
    assert layout_of(6, 6).sampling_fields == layout_of(6, 20).sampling_fields


SETTINGS = [
    SamplingParams(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05),
    SamplingParams(repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.25),
    SamplingParams(temperature=0),
]


def sampling_of(packer: Packer, decision: Decision) -> Any:
    layout = layout_of(4, 8)
    return batch.unpack_sampling(layout, jnp.asarray(pack(packer, layout, decision)))


def test_sampling_settings_arrive_and_stay_with_the_row() -> None:
    """They are written when the row changes hands, and found again in whatever lane it stands."""
    packer = Packer(ROWS)
    rows, seeds = [4, 0, 2], [2**64 - 1, 7, 1 << 32]
    parts = [
        Part(row, 0, 1, params=params, seed=seed)
        for row, params, seed in zip(rows, SETTINGS, seeds)
    ]
    sampling_of(packer, decision_of(*parts, num_new_rows=3))
    later = [Part(row, 0, 1) for row in reversed(rows)]
    inputs = sampling_of(packer, decision_of(*later))
    for lane, (row, params, seed) in enumerate(zip(rows[::-1], SETTINGS[::-1], seeds[::-1])):
        assert inputs.row[lane] == row
        for name in (*batch.FLOAT_WORDS, "top_k"):
            assert getattr(inputs, name)[lane] == np.float32(getattr(params, name))
        assert inputs.seed[lane].tolist() == [seed >> 32, seed % 2**32]
        assert inputs.output_index[lane] == 3
    assert inputs.row[3] == ROWS  # no lane


def test_a_lane_that_samples_nothing_has_no_row() -> None:
    decision = decision_of(Part(1, 0, 2, samples=False), Part(2, 0, 2), num_new_rows=1)
    assert sampling_of(Packer(ROWS), decision).row.tolist() == [ROWS, 2, ROWS, ROWS]


def test_only_lanes_that_sample_and_ask_for_edits_have_a_row_of_them() -> None:
    """Others would read, or change, those of a row's owner before."""
    edits = SamplingParams(logit_bias={3: 1.0})
    parts = [
        Part(4, 0, 1),
        Part(1, 0, 1, params=edits),
        Part(2, 0, 2, params=edits, samples=False),
    ]
    packer = Packer(ROWS)
    inputs = sampling_of(packer, decision_of(*parts, num_new_rows=3))
    assert inputs.edited.tolist() == [ROWS, 1, ROWS, ROWS]
    inputs = sampling_of(packer, decision_of(Part(1, 0, 1), num_new_rows=1))
    assert inputs.edited.tolist() == [ROWS] * 4


@pytest.mark.parametrize(("min_tokens", "forbidden"), [(4, [5, 9, 200]), (3, []), (0, [])])
def test_stop_tokens_are_forbidden_until_min_tokens(min_tokens: int, forbidden: list[int]) -> None:
    """The output index is 3: this is the fourth token."""
    params = SamplingParams(min_tokens=min_tokens)
    part = Part(1, 0, 1, params=params, stop_token_ids=frozenset([9, 200, 5]))
    inputs = sampling_of(Packer(ROWS), decision_of(Part(2, 0, 1), part, num_new_rows=1))
    assert [token for token in inputs.forbidden[1].tolist() if token >= 0] == forbidden
    assert (np.asarray(inputs.forbidden)[[0, 2, 3]] == -1).all()


def test_more_end_tokens_than_there_is_room_for_are_no_error() -> None:
    """A model may have any number of its own."""
    params = SamplingParams(min_tokens=4)
    part = Part(1, 0, 1, params=params, stop_token_ids=frozenset(range(100)))
    inputs = sampling_of(Packer(ROWS), decision_of(part, num_new_rows=1))
    assert inputs.forbidden[0].tolist() == list(range(batch.MAX_FORBIDDEN))


@pytest.mark.parametrize(
    ("settings", "variant"),
    [
        ({"temperature": 0}, "greedy"),
        ({}, "sample"),
        ({"temperature": 0, "presence_penalty": 1.0}, "sample"),
        ({"temperature": 0, "min_tokens": 1}, "sample"),
        ({"temperature": 0, "logprobs": 0}, "full"),
        ({"temperature": 0, "logit_bias": {1: 0}}, "full"),
        ({"temperature": 0, "allowed_token_ids": [1]}, "full"),
        ({"temperature": 0, "bad_words_token_ids": [[1]]}, "full"),
        ({"temperature": 0, "prompt_logprobs": 1}, "greedy"),
    ],
)
def test_the_most_demanding_lane_of_a_step_chooses_the_sampler(
    settings: dict[str, Any], variant: str
) -> None:
    packer = Packer(ROWS)
    greedy = Part(1, 0, 1, params=SamplingParams(temperature=0))
    demanding = Part(2, 0, 1, params=SamplingParams(**settings))
    decision = decision_of(demanding, greedy, num_new_rows=2)
    packer.enter_new_rows(decision)
    assert packer.variant(decision) == variant
    assert packer.variant(decision_of(greedy)) == "greedy"


# --- the page table -------------------------------------------------------------------------------


def test_updates_change_just_their_cells_and_unused_ones_none() -> None:
    layout = layout_of(6, 20)
    cells = [(2, 0, 201), (2, 1, 202), (2, 2, 203)]
    packed = pack(Packer(ROWS), layout, decision_of(Part(2, 0, 9), table_updates=cells))
    before = np.random.default_rng(0).integers(0, 99, (ROWS, COLUMNS)).astype(np.int32)
    inputs, after = jax.jit(batch.unpack_inputs, static_argnums=0)(
        layout, packed, jnp.asarray(before), jnp.asarray(LAST_TOKEN)
    )
    want = before.copy()
    want[2, :3] = [201, 202, 203]
    np.testing.assert_array_equal(after, want)
    np.testing.assert_array_equal(inputs.page_table, want[None])
    # The step's own pages are known to its own tokens.
    assert inputs.write_page[0, :9].tolist() == [201] * 4 + [202] * 4 + [203]


@pytest.mark.parametrize(("lanes", "tokens"), [(4, 4), (6, 20), (1, 2)])
def test_there_is_room_for_the_pages_that_a_steps_tokens_need(lanes: int, tokens: int) -> None:
    """Each lane may begin one page more than its tokens fill."""
    layout = layout_of(lanes, tokens)
    assert layout.num_table_updates >= lanes
    one_each, rest = min(lanes, tokens), max(tokens - lanes, 0)
    assert layout.num_table_updates >= one_each + rest // PAGE_SIZE


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket", "lanes", "tokens", "fits"),
    [
        (Bucket(4, 4), 4, 4, True),
        (Bucket(4, 4), 1, 1, True),
        (Bucket(4, 4), 2, 3, False),
        (Bucket(4, 4), 5, 5, False),
        (Bucket(4, 9), 2, 3, True),
        (Bucket(4, 9), 4, 4, True),
        (Bucket(4, 9), 5, 5, False),
        (Bucket(4, 9), 1, 10, False),
    ],
)
def test_what_fits_a_bucket(bucket: Bucket, lanes: int, tokens: int, fits: bool) -> None:
    assert bucket.fits(lanes, tokens) == fits
