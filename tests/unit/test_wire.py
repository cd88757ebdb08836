"""Frames: whatever cuts the stream, whatever a hostile peer puts into it."""

from __future__ import annotations

import itertools
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbotvm_qemu.guest import wire
from pbotvm_qemu.guest.wire import Decoder, Frame, FrameType, WireError

frames = st.builds(
    Frame, type=st.integers(0, 255), id=st.integers(0, 2**32 - 1), payload=st.binary(max_size=300)
)  # fmt: skip


def encoded(items: list[Frame]) -> bytes:
    return b"".join(wire.encode(*item) for item in items)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


def feed(decoder: Decoder, pieces: list[bytes]) -> list[Frame]:
    return [frame for piece in pieces for frame in decoder.feed(piece)]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 5000), max_size=20))
def test_frames_come_back_however_the_stream_is_cut(items: list[Frame], cuts: list[int]) -> None:
    decoder = Decoder()
    assert feed(decoder, chunks(encoded(items), cuts)) == items
    assert decoder.idle


@given(st.lists(frames, min_size=1, max_size=3))
def test_frames_come_back_byte_by_byte(items: list[Frame]) -> None:
    assert feed(Decoder(), [bytes([byte]) for byte in encoded(items)]) == items


@given(st.binary(min_size=1, max_size=500), st.lists(st.integers(0, 500), max_size=5))
def test_any_bytes_give_frames_or_an_error_of_the_protocol(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder()
    try:
        feed(decoder, chunks(data, cuts))
    except WireError:
        return
    assert decoder.idle or data[0] == wire.MAGIC or len(data) < wire.HEADER.size


@given(st.integers(0, 255).filter(lambda byte: byte != wire.MAGIC))
def test_wrong_first_byte_is_named(byte: int) -> None:
    with pytest.raises(WireError, match=f"byte 0x{byte:02x}"):
        Decoder().feed(bytes([byte]) * wire.HEADER.size)


@pytest.mark.parametrize("length", [wire.PAYLOAD_MAX + 1, 2**32 - 1])
def test_oversized_frame_is_refused_before_its_payload_comes(length: int) -> None:
    with pytest.raises(WireError, match=str(length)):
        Decoder().feed(wire.HEADER.pack(wire.MAGIC, FrameType.DATA, 1, length))


def test_largest_frame_passes_and_one_byte_more_cannot_be_made() -> None:
    payload = bytes(wire.PAYLOAD_MAX)
    assert Decoder().feed(wire.encode(FrameType.DATA, 1, payload)) == [(FrameType.DATA, 1, payload)]
    with pytest.raises(WireError, match=str(wire.PAYLOAD_MAX + 1)):
        wire.encode(FrameType.DATA, 1, payload + b"x")


def test_error_after_good_frames_loses_the_stream() -> None:
    with pytest.raises(WireError):
        Decoder().feed(wire.encode(FrameType.PING, 1) + b"x" * wire.HEADER.size)


def test_decoder_holds_no_more_than_one_frame() -> None:
    decoder = Decoder()
    largest = wire.HEADER.size + wire.PAYLOAD_MAX
    stream = wire.encode(FrameType.DATA, 1, bytes(wire.PAYLOAD_MAX)) * 3
    for start in range(0, len(stream), 1000):
        decoder.feed(stream[start : start + 1000])
        assert len(decoder._buffer) < largest


NONCE = "0123456789abcdef"
ANSWER = wire.encode_json(FrameType.HELLO, 0, {"nonce": NONCE, "protocol": 1})


@given(
    st.one_of(st.binary(max_size=300), st.lists(frames, max_size=3).map(encoded)),
    st.integers(0, 100),
    st.lists(st.integers(0, 1000), max_size=10),
)
def test_hello_is_found_behind_the_rest_of_an_older_conversation(older: bytes, lost: int, cuts: list[int]) -> None:
    decoder = Decoder()
    decoder.expect_hello(NONCE)
    stream = older[min(lost, len(older)) :] + ANSWER + wire.encode(FrameType.PING, 4, b"next")
    hello, ping = feed(decoder, chunks(stream, cuts))
    assert wire.decode_json(hello.payload)["nonce"] == NONCE
    assert ping == (FrameType.PING, 4, b"next")


def test_hello_is_not_the_answer_to_another_nonce() -> None:
    decoder = Decoder()
    decoder.expect_hello("f" * 16)
    assert decoder.feed(ANSWER * 10) == []


def test_hello_is_found_in_a_frame_that_never_ended() -> None:
    decoder = Decoder()
    decoder.expect_hello(NONCE)
    cut_off = wire.HEADER.pack(wire.MAGIC, FrameType.STDOUT, 3, wire.PAYLOAD_MAX) + bytes(70)
    assert [frame.type for frame in decoder.feed(cut_off + ANSWER)] == [FrameType.HELLO]


@pytest.mark.parametrize("before", range(wire.HEADER.size))
def test_hello_is_found_behind_an_echo_of_its_question(before: int) -> None:
    """Of which the begin was lost: there is no room for a header in front of that nonce."""
    stream = bytes(before) + b'{"nonce":"' + NONCE.encode() + b'"' + ANSWER
    for size in (1, 7, 1000):
        decoder = Decoder()
        decoder.expect_hello(NONCE)
        found = feed(decoder, [stream[start : start + size] for start in range(0, len(stream), size)])
        assert [frame.type for frame in found] == [FrameType.HELLO]


def test_decoder_that_waits_for_hello_forgets_what_it_skips() -> None:
    decoder = Decoder()
    decoder.expect_hello(NONCE)
    for _ in range(100):
        assert decoder.feed(bytes(100_000)) == []
        assert len(decoder._buffer) < 200


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"1",
        b"{",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"a":' * 13_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=lambda payload: f"{payload[:8]!r} of {len(payload)}",
)
def test_control_payload_that_is_no_object_is_an_error_of_the_protocol(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_json(payload)


scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20)
json_values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)


@given(st.dictionaries(st.text(max_size=10), json_values, max_size=5))
def test_objects_come_back_from_control_frames(value: dict[str, object]) -> None:
    (frame,) = Decoder().feed(wire.encode_json(FrameType.RUN, 1, value))
    assert wire.decode_json(frame.payload) == value == json.loads(frame.payload)


@given(st.integers(0, 2**32 - 1))
def test_credit_comes_back(count: int) -> None:
    (frame,) = Decoder().feed(wire.encode_credit(5, count))
    assert (frame.type, frame.id, wire.credit(frame)) == (FrameType.CREDIT, 5, count)


@pytest.mark.parametrize("payload", [b"", b"123", b"12345"])
def test_credit_of_another_size_is_an_error_of_the_protocol(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.credit(Frame(FrameType.CREDIT, 1, payload))


def test_header_is_as_documented() -> None:
    assert wire.encode(FrameType.STDOUT, 258, b"abc") == b"\xf5\x07" + struct.pack("!II", 258, 3) + b"abc"
