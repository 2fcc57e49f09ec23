"""The packed array: what the host puts in, the device takes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine import batch
from jaxserve.engine.batch import Bucket, Layout, Packer
from jaxserve.engine.page_allocator import PADDING_PAGE
from jaxserve.engine.request import Decision, Request, ScheduledRequest
from jaxserve.sampling.params import SamplingParams

ROWS, PAGE_SIZE, COLUMNS = 6, 4, 16
LAST_TOKEN = 1000 + np.arange(ROWS, dtype=np.int32)


def layout_of(lanes: int, tokens: int, split: bool = False) -> Layout:
    return Layout.make(Bucket(lanes, tokens), PAGE_SIZE, ROWS, group=2, split=split)


def part(
    row: int,
    start: int,
    count: int,
    *,
    unknown_last: bool = False,
    samples: bool = True,
    new_row: bool = False,
    prompt_len: int | None = None,
    pages_from: int = 0,
    params: SamplingParams | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    seed: int = 0,
) -> ScheduledRequest:
    """A request's part of a step: ``count`` tokens from ``start``, in a row with pages of its own
    (row r has pages 100 r + 1, 100 r + 2, ...), entered from column ``pages_from``."""
    known = [10 * row + position for position in range(start + count - unknown_last)]
    num_pages = -(-(start + count) // PAGE_SIZE)
    pages = [100 * row + 1 + column for column in range(num_pages)]
    request = Request(
        request_id=str(row),
        token_ids=known,
        params=params or SamplingParams(),
        max_tokens=99,
        stop_token_ids=stop_token_ids,
        seed=seed,
        num_prompt_tokens=min(prompt_len or len(known), len(known)),
        pages=pages,
        row=row,
    )
    return ScheduledRequest(
        request=request,
        row=row,
        start=start,
        num_scheduled_tokens=count,
        samples=samples,
        output_index=3,
        new_row=new_row,
        first_new_page=pages_from,
        new_pages=tuple(pages[pages_from:]),
        num_preemptions=0,
    )


@st.composite
def decisions(draw: st.DrawFn, lanes: int, tokens: int) -> Decision:
    """Any decision that fits a bucket: rows in any order, chunks anywhere."""
    rows = draw(st.permutations(range(ROWS)))[: draw(st.integers(1, min(lanes, ROWS)))]
    left = tokens - len(rows)
    parts = []
    for row in rows:
        more = draw(st.integers(0, left)) if tokens > lanes else 0
        left -= more
        start = draw(st.integers(0, COLUMNS * PAGE_SIZE - more - 1))
        unknown = start + more > 0 and draw(st.booleans())
        parts.append(part(row, start, 1 + more, unknown_last=unknown, samples=draw(st.booleans())))
    return Decision(tuple(parts))


def full_table(decision: Decision) -> np.ndarray:
    """A table in which all pages of the decision stand."""
    table = np.zeros((ROWS, COLUMNS), np.int32)
    for item in decision.scheduled:
        table[item.row, : len(item.request.pages)] = item.request.pages
    return table


@pytest.mark.parametrize(("lanes", "tokens"), [(6, 20), (6, 6), (8, 9), (1, 2)])
@given(data=st.data())
@settings(max_examples=40)
def test_the_model_gets_each_token_where_it_belongs(
    lanes: int, tokens: int, data: st.DataObject
) -> None:
    decision = data.draw(decisions(lanes, tokens))
    layout = layout_of(lanes, tokens)
    packed = Packer(ROWS).pack(layout, decision, np.zeros((0, 3), np.int32))
    inputs, table = batch.unpack_inputs(
        layout, packed, jnp.asarray(full_table(decision)), jnp.asarray(LAST_TOKEN)
    )
    np.testing.assert_array_equal(table, full_table(decision))
    at = 0
    for lane, item in enumerate(decision.scheduled):
        places = slice(at, at + item.num_scheduled_tokens)
        position = np.arange(item.start, item.start + item.num_scheduled_tokens)
        ids = [LAST_TOKEN[item.row] if token == -1 else token for token in item.token_ids]
        np.testing.assert_array_equal(inputs.token_ids[places], ids)
        np.testing.assert_array_equal(inputs.positions[places], position)
        pages = np.array(item.request.pages)
        np.testing.assert_array_equal(inputs.write_page[places], pages[position // PAGE_SIZE])
        np.testing.assert_array_equal(inputs.write_slot[places], position % PAGE_SIZE)
        longest = np.maximum(item.request.num_prompt_tokens, position + 1)
        np.testing.assert_array_equal(inputs.rope_lengths[places], longest)
        at += item.num_scheduled_tokens
        assert inputs.sample_index[lane] == at - 1
        attention = inputs.attention
        assert attention.row[lane] == item.row
        assert attention.query_start[lane] == at - item.num_scheduled_tokens
        assert attention.query_len[lane] == item.num_scheduled_tokens
        assert attention.kv_len[lane] == position[-1] + 1
    # What is left over writes to the padding page, attends to nothing and reads nothing unknown.
    np.testing.assert_array_equal(inputs.write_page[at:], PADDING_PAGE)
    np.testing.assert_array_equal(inputs.positions[at:], 0)
    count = len(decision.scheduled)
    for name in ("query_len", "kv_len", "decode_count"):
        np.testing.assert_array_equal(getattr(inputs.attention, name)[count:], 0)
    assert (np.asarray(inputs.sample_index) < tokens).all()


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
    packed = packer.pack(layout, decision, np.zeros((0, 3), np.int32))
    return batch.unpack_sampling(layout, jnp.asarray(packed))


def test_sampling_settings_arrive_and_stay_with_the_row() -> None:
    """They are written when the row changes hands, and found again in whatever lane it stands."""
    packer = Packer(ROWS)
    rows, seeds = [4, 0, 2], [2**64 - 1, 7, 1 << 32]
    items = [
        part(row, 0, 1, new_row=True, params=params, seed=seed)
        for row, params, seed in zip(rows, SETTINGS, seeds)
    ]
    sampling_of(packer, Decision(tuple(items)))
    later = [
        item._replace(
            new_row=False, request=dataclasses.replace(item.request, params=SamplingParams())
        )
        for item in items
    ]
    inputs = sampling_of(packer, Decision(tuple(later[::-1])))
    for lane, (row, params, seed) in enumerate(zip(rows[::-1], SETTINGS[::-1], seeds[::-1])):
        assert inputs.row[lane] == row
        for name in (*batch.FLOAT_WORDS, "top_k"):
            assert getattr(inputs, name)[lane] == np.float32(getattr(params, name))
        assert inputs.seed[lane].tolist() == [seed >> 32, seed % 2**32]
        assert inputs.output_index[lane] == 3
    assert inputs.row[3] == ROWS  # no lane


def test_a_lane_that_samples_nothing_has_no_row() -> None:
    inputs = sampling_of(
        Packer(ROWS), Decision((part(1, 0, 2, samples=False), part(2, 0, 2, new_row=True)))
    )
    assert inputs.row.tolist() == [ROWS, 2, ROWS, ROWS]


@pytest.mark.parametrize(("min_tokens", "forbidden"), [(4, [5, 9, 200]), (3, []), (0, [])])
def test_stop_tokens_are_forbidden_until_min_tokens(min_tokens: int, forbidden: list[int]) -> None:
    """The output index is 3: this is the fourth token."""
    params = SamplingParams(min_tokens=min_tokens)
    item = part(1, 0, 1, new_row=True, params=params, stop_token_ids=frozenset([9, 200, 5]))
    inputs = sampling_of(Packer(ROWS), Decision((item,)))
    assert [token for token in inputs.forbidden[0].tolist() if token >= 0] == forbidden
    assert (inputs.forbidden[1:] == -1).all()


def test_more_end_tokens_than_there_is_room_for_are_no_error() -> None:
    """A model may have any number of its own."""
    params = SamplingParams(min_tokens=4)
    item = part(1, 0, 1, new_row=True, params=params, stop_token_ids=frozenset(range(100)))
    inputs = sampling_of(Packer(ROWS), Decision((item,)))
    assert inputs.forbidden[0].tolist() == list(range(batch.MAX_FORBIDDEN))


# --- the page table -------------------------------------------------------------------------------


def test_table_updates_name_every_new_page() -> None:
    decision = Decision((part(2, 0, 9), part(5, 7, 6, pages_from=2)))
    assert batch.table_updates(decision).tolist() == [
        [2, 0, 201],
        [2, 1, 202],
        [2, 2, 203],
        [5, 2, 503],
        [5, 3, 504],
    ]
    assert batch.table_updates(Decision((part(0, 3, 1, pages_from=1),))).shape == (0, 3)


def test_updates_change_just_their_cells_and_unused_ones_none() -> None:
    layout = layout_of(6, 20)
    decision = Decision((part(2, 0, 9),))
    updates = batch.table_updates(decision)
    packed = Packer(ROWS).pack(layout, decision, updates)
    before = np.random.default_rng(0).integers(0, 99, (ROWS, COLUMNS)).astype(np.int32)
    inputs, after = jax.jit(batch.unpack_inputs, static_argnums=0)(
        layout, packed, jnp.asarray(before), jnp.asarray(LAST_TOKEN)
    )
    want = before.copy()
    want[2, :3] = [201, 202, 203]
    np.testing.assert_array_equal(after, want)
    np.testing.assert_array_equal(inputs.page_table, want)
    # The step's own pages are known to its own tokens.
    assert inputs.write_page[:9].tolist() == [201] * 4 + [202] * 4 + [203]


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
