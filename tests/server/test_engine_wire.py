"""Frames: what goes in comes out, and everything else is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import wire

MESSAGES: list[wire.Message] = [
    wire.Submit("a", [1, 2**31], {"temperature": 0.5, "logit_bias": {7: 1.0}}, "salt", 0, 1.0),
    wire.Abort(["a", "b"]),
    wire.Embed("a", [1], "mean", 1.0),
    wire.GetStats("a"),
    wire.Reply("a", {"steps": 1}, None),
    wire.Starting("weights", 1, 2, None),
    wire.Starting("weights", 1, 2, 0),
    wire.Ready({"model": "m"}),
    wire.Heartbeat(0.0, 1, 2, False),
    wire.Events({"b": [2, 3]}, [["a", [1], None, "stop", None, 0, None, None]]),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: wire.Message) -> None:
    frame = wire.encode(message)
    header, payload = frame[: wire.HEADER.size], frame[wire.HEADER.size :]
    assert wire.payload_size(header) == len(payload)
    assert wire.decode(payload) == message


@pytest.mark.parametrize(
    "value",
    [
        None, 1, "Abort", [], [1], ["Nothing"], [["Abort"]], {"Abort": []},
        ["Abort"], ["Abort", "a"], ["Abort", [1]], ["Abort", ["a"], 1],
        ["GetStats", b"a"], ["GetStats", None],
        ["Submit", "a", [True], {}, "", 0, 1.0], ["Submit", "a", [1.0], {}, "", 0, 1.0],
        ["Submit", "a", [1], {1: 2}, "", 0, 1.0], ["Submit", "a", [1], [], "", 0, 1.0],
        ["Submit", "a", [1], {}, "", 0, "1"], ["Submit", 1, [1], {}, "", 0, 1.0],
        ["Heartbeat", True, 0, 0], ["Starting", "weights", 1, 2, "soon"],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_message_is_refused(value: Any) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(msgpack.packb(value))


@given(st.lists(st.sampled_from(MESSAGES), max_size=6), st.data())
def test_frames_come_out_of_pieces_of_any_sizes(
    messages: list[wire.Message], data: st.DataObject
) -> None:
    arriving, frames, got = b"".join(map(wire.encode, messages)), wire.Frames(), []
    while arriving:
        size = data.draw(st.integers(1, len(arriving)))
        got += [wire.decode(payload) for payload in frames.add(arriving[:size])]
        arriving = arriving[size:]
    assert got == messages


def test_a_frame_that_is_too_large_is_refused_when_its_header_is_here() -> None:
    frames = wire.Frames()
    assert not list(frames.add(b"\xff\xff\xff"))
    with pytest.raises(wire.WireError):
        list(frames.add(b"\xff"))


@given(st.binary(max_size=60))
def test_no_bytes_do_anything_but_decode_or_be_refused(payload: bytes) -> None:
    try:
        wire.decode(payload)
    except wire.WireError:
        return


@given(st.data())
def test_a_damaged_frame_does_nothing_but_decode_or_be_refused(data: st.DataObject) -> None:
    payload = bytearray(wire.encode(data.draw(st.sampled_from(MESSAGES)))[wire.HEADER.size :])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.decode(bytes(payload[: data.draw(st.integers(0, len(payload)))]))
    except wire.WireError:
        return


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(wire.WireError):
        wire.decode(b"\x91" * 100_000)


@pytest.mark.parametrize("size", [wire.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_an_oversized_frame_is_refused_by_its_header(size: int) -> None:
    with pytest.raises(wire.WireError):
        wire.payload_size(wire.HEADER.pack(size))
    assert wire.payload_size(wire.HEADER.pack(wire.MAX_FRAME_BYTES)) == wire.MAX_FRAME_BYTES


def test_a_header_that_was_cut_off_is_refused() -> None:
    with pytest.raises(wire.WireError):
        wire.payload_size(b"\0\0\0")


def test_a_message_too_large_to_send_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    wire.encode(wire.Abort(["a" * 80]))
    with pytest.raises(wire.WireError):
        wire.encode(wire.Abort(["a" * 101]))
