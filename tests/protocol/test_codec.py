"""Any bytes decode to a frame or raise; what is encoded comes back."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsfed.errors import LocalProtocolError, RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol.codec import ITEM_SIZES, Outgoing, decode, encode, pack, tensor_bytes


def frame_of(header: object, tail: bytes = b"") -> bytes:
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    return struct.pack("<I", len(packed)) + packed + tail


tensors = st.builds(
    lambda dtype, shape, fill: Outgoing(
        dtype, tuple(shape), memoryview(bytes([fill]) * tensor_bytes(dtype, shape))
    ),
    st.sampled_from(sorted(ITEM_SIZES)),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 255),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=10,
)


@given(
    seq=st.integers(0, 2**53 - 1),
    ack=st.integers(0, 2**53 - 1),
    messages=st.lists(st.lists(plain, max_size=4), max_size=40),
    table=st.lists(tensors, max_size=5),
)
def test_what_is_encoded_comes_back(
    seq: int, ack: int, messages: list[list[object]], table: list[Outgoing]
) -> None:
    data = b"".join(encode(seq, ack, [pack(message) for message in messages], table))
    frame = decode(data)
    assert (frame.seq, frame.ack) == (seq, ack)
    assert msgpack.packb(frame.messages) == msgpack.packb(messages)
    for entry, sent in zip(frame.tensors, table, strict=True):
        assert (entry.dtype, entry.shape) == (sent.dtype, sent.shape)
        assert bytes(frame.segment(entry)) == bytes(sent.data)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise(data: bytes) -> None:
    try:
        decode(data)
    except RemoteProtocolError:
        pass


@given(data=st.data(), table=st.lists(tensors, max_size=3))
def test_a_frame_with_a_byte_changed_or_cut_decodes_or_raises(
    data: st.DataObject, table: list[Outgoing]
) -> None:
    whole = bytearray(b"".join(encode(3, 2, [pack([40, 1])], table)))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for damaged in (bytes(whole), bytes(whole[: data.draw(st.integers(0, len(whole)))])):
        try:
            decode(damaged)
        except RemoteProtocolError:
            pass


def test_segments_are_aligned_so_that_typed_arrays_can_view_them() -> None:
    table = [
        Outgoing("uint8", (3,), memoryview(b"abc")),
        Outgoing("float64", (1,), memoryview(b"12345678")),
    ]
    buffers = encode(1, 0, [pack([40, 1])], table)
    assert len(buffers[0]) % limits.ALIGNMENT == 0
    frame = decode(b"".join(buffers))
    assert [entry.place % limits.ALIGNMENT for entry in frame.tensors] == [0, 0]


def test_tensor_bytes_are_not_copied_by_the_encoder_or_the_decoder() -> None:
    data = memoryview(bytearray(1000))
    buffers = encode(1, 0, [pack([40, 1])], [Outgoing("uint8", (1000,), data)])
    assert any(buffer is data for buffer in buffers)
    whole = bytearray(b"".join(buffers))
    frame = decode(whole)
    whole[-30] = 7
    assert 7 in bytes(frame.segment(frame.tensors[0]))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "at least 4 bytes"),
        (b"\x01\x00", "at least 4 bytes"),
        (struct.pack("<I", 5) + b"\x94", "does not fit"),
        (struct.pack("<I", 2**31) + b"\x94", "does not fit"),
        (frame_of(b"\x91" * 100_000 + b"\xc0"), "not msgpack"),
        (frame_of(b"\xdd\xff\xff\xff\xff"), "not msgpack"),  # a list of four billion
        (frame_of(b"\xdb\xff\xff\xff\xff"), "not msgpack"),  # a text of four billion
        (frame_of(b"\xc6\xff\xff\xff\xff"), "not msgpack"),  # bytes of four billion
        (frame_of(msgpack.packb([1, 0, [], []]) + b"\x00"), "not msgpack"),
        (frame_of(msgpack.packb([1, 0, [], []])[:-1]), "not msgpack"),
        (frame_of([1, 0, [msgpack.ExtType(4, b"x")], []]), "not msgpack"),
        (frame_of([1, 0, [{1: 2}], []]), "not msgpack"),
        (frame_of(b"\x94\x01\x00\x91\xa1\xff\x90"), "not msgpack"),  # text that is not UTF-8
        (frame_of([1, 0, []]), "an array of four"),
        (frame_of({"seq": 1}), "an array of four"),
        (frame_of(["1", 0, [], []]), "unsigned integers"),
        (frame_of([-1, 0, [], []]), "unsigned integers"),
        (frame_of([True, 0, [], []]), "unsigned integers"),
        (frame_of([1, 2**60, [], []]), "unsigned integers"),
        (frame_of([1, 0, None, []]), "are arrays"),
        (frame_of([1, 0, [], ["x"]]), "an array of four"),
        (frame_of([1, 0, [], [["float33", [1], 0, 4]]], bytes(16)), "no dtype 'float33'"),
        (frame_of([1, 0, [], [[7, [1], 0, 4]]], bytes(16)), "no dtype '7'"),
        (frame_of([1, 0, [], [["float32", [2], 0, 4]]], bytes(16)), "has not the 4 bytes"),
        (frame_of([1, 0, [], [["float32", [-1], 0, 4]]], bytes(16)), "unsigned integers"),
        (frame_of([1, 0, [], [["uint8", [1] * 65, 0, 1]]], bytes(16)), "at most 64 sizes"),
        (frame_of([1, 0, [], [["uint8", [2**50], 0, 2**50]]], bytes(16)), "has not the"),
        (frame_of([1, 0, [], [["uint8", [4], 16, 4]]], bytes(36)), "one after the other"),
        (frame_of([1, 0, [], [["uint8", [4], "0", 4]]], bytes(36)), "a place is an integer"),
        (frame_of([1, 0, [], [["uint8", [4], 0, 4]]]), "the segments need 16 bytes"),
        (frame_of([1, 0, [], []], b"more"), "the segments need 0 bytes, and 4 came"),
        (bytes(limits.MAX_FRAME_BYTES + 1), "a frame has at most"),
    ],
)
def test_what_is_no_frame_is_refused_with_a_sentence(data: bytes, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        decode(data)


def test_what_has_no_wire_form_is_refused_at_once() -> None:
    for value in (object(), 2**70, {"x": {1, 2}}):
        with pytest.raises(LocalProtocolError, match="no wire form"):
            pack([33, value])


def test_a_header_larger_than_the_peer_accepts_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="too large"):
        encode(1, 0, [bytes(limits.MAX_HEADER_BYTES)])
