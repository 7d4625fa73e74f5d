"""Streams: cut up, put together, and bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.pair import memory
from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol.chunks import Assembler, cut


@given(st.integers(1, 3 * limits.CHUNK_BYTES))
def test_what_is_cut_is_put_together_again(size: int) -> None:
    data = memoryview(bytes(i % 251 for i in range(1024)) * (size // 1024 + 1))[:size]
    assembler = Assembler(memory)
    assembler.open(1, size)
    for offset, piece in cut(data):
        assert len(piece) <= limits.CHUNK_BYTES
        assembler.write(1, offset, piece)
    assert assembler.take(1, size) == data
    assert assembler.unfinished_bytes == 0


def test_a_stream_without_room_is_read_and_thrown_away() -> None:
    assembler = Assembler(lambda nbytes: None)
    assembler.open(1, 10)
    assembler.write(1, 0, memoryview(b"0123456789"))
    assert assembler.take(1, 10) is None


@pytest.mark.parametrize(
    ("offset", "data"),
    [(1, b"x"), (0, b"x" * 11), (5, b"x"), (0, b"x" * (limits.CHUNK_BYTES + 1))],
)
def test_gaps_and_surplus_are_refused(offset: int, data: bytes) -> None:
    assembler = Assembler(memory)
    assembler.open(1, 10 if len(data) < 100 else 10 * limits.CHUNK_BYTES)
    with pytest.raises(RemoteProtocolError):
        assembler.write(1, offset, memoryview(data))


def test_streams_are_bounded_in_number_and_size() -> None:
    assembler = Assembler(memory)
    with pytest.raises(RemoteProtocolError, match="too large"):
        assembler.open(1, limits.MAX_TENSOR_BYTES + 1)
    for number in range(limits.MAX_OPEN_STREAMS):
        assembler.open(number + 1, 1)
    with pytest.raises(RemoteProtocolError, match="too many"):
        assembler.open(99, 1)


def test_a_known_number_cannot_be_opened_and_an_unknown_one_not_written_or_taken() -> None:
    assembler = Assembler(memory)
    assembler.open(1, 4)
    with pytest.raises(RemoteProtocolError, match="open already"):
        assembler.open(1, 4)
    with pytest.raises(RemoteProtocolError, match="not open"):
        assembler.write(2, 0, memoryview(b"x"))
    with pytest.raises(RemoteProtocolError, match="has not these"):
        assembler.take(2, 4)


def test_an_incomplete_stream_cannot_be_taken() -> None:
    assembler = Assembler(memory)
    assembler.open(1, 4)
    assembler.write(1, 0, memoryview(b"abc"))
    with pytest.raises(RemoteProtocolError, match="has not these"):
        assembler.take(1, 4)
