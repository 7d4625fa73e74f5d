"""Frames: what one binary WebSocket message holds.

::

    u32 length of the header, little endian
    header      msgpack: [seq, ack, [message, ...], [tensor, ...]]
    padding     zeros up to a multiple of 16
    segments    the tensors' bytes, each padded to a multiple of 16

``seq`` numbers the frames of one direction from 1; 0 marks a control frame. ``ack`` is the number
of the last frame of the other direction that has been processed. A tensor's entry is ``[dtype,
shape, place, nbytes]``: a place of 0 or more is an offset into the segments, a negative one
names the stream that carried the bytes. The tensors' bytes never pass through msgpack.

Any bytes decode to a frame or raise :class:`~wsfed.errors.RemoteProtocolError`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import msgpack

from wsfed.errors import LocalProtocolError, RemoteProtocolError
from wsfed.protocol import limits

__all__ = [
    "ITEM_SIZES",
    "Buffer",
    "Entry",
    "Frame",
    "Outgoing",
    "decode",
    "encode",
    "pack",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

#: Bytes an element, by the name of the dtype (torch's, without ``torch.``).
ITEM_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "bool": 1,
        "uint8": 1,
        "int8": 1,
        "uint16": 2,
        "int16": 2,
        "uint32": 4,
        "int32": 4,
        "uint64": 8,
        "int64": 8,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "float16": 2,
        "bfloat16": 2,
        "float32": 4,
        "float64": 8,
        "complex32": 4,
        "complex64": 8,
        "complex128": 16,
    }
)

_LENGTH = struct.Struct("<I")
_PADDING = bytes(limits.ALIGNMENT)
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the frame's table describes it."""

    dtype: str
    shape: tuple[int, ...]
    #: Offset into the segments, or minus the number of a stream.
    place: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to send: ``data`` are its bytes, or the stream that carries them."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame. ``segments`` is a view of everything behind the header."""

    seq: int
    ack: int
    messages: list[Any]
    tensors: tuple[Entry, ...]
    segments: memoryview

    def segment(self, entry: Entry) -> memoryview:
        """The bytes of an entry that lies in this frame."""
        return self.segments[entry.place : entry.place + entry.nbytes]


# --- sending -------------------------------------------------------------------------------------


#: One for all threads: msgpack's extension does not let go of the interpreter while it packs.
_packer: Final = msgpack.Packer()


def pack(value: Any) -> bytes:
    """Pack one message.

    Raises:
        LocalProtocolError: the value has no wire form.
    """
    try:
        return _packer.pack(value)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError("unsendable", f"this has no wire form: {error}") from error


def _array(length: int) -> bytes:
    if length < 16:
        return bytes((0x90 | length,))
    if length < 65536:
        return b"\xdc" + length.to_bytes(2, "big")
    return b"\xdd" + length.to_bytes(4, "big")


def _padding(length: int) -> bytes:
    return _PADDING[: -length % limits.ALIGNMENT]


def encode(
    seq: int, ack: int, messages: Sequence[bytes], tensors: Iterable[Outgoing] = ()
) -> list[Buffer]:
    """Lay a frame out: buffers to send one after the other, the tensors' own among them.

    Args:
        seq: number of the frame, 0 for a control frame.
        ack: number of the last frame processed.
        messages: packed messages (:func:`pack`).
        tensors: the frame's table.

    Raises:
        LocalProtocolError: the header would be larger than the peer accepts.
    """
    table: list[list[Any]] = []
    segments: list[Buffer] = []
    place = 0
    for tensor in tensors:
        nbytes = tensor_bytes(tensor.dtype, tensor.shape)
        table.append([tensor.dtype, tensor.shape, -tensor.stream or place, nbytes])
        if not tensor.stream:
            padding = _padding(nbytes)
            segments += (tensor.data, padding) if padding else (tensor.data,)
            place += nbytes + len(padding)
    header = b"".join(
        (b"\x94", pack(seq), pack(ack), _array(len(messages)), *messages, pack(table))
    )
    if len(header) > limits.MAX_HEADER_BYTES:
        raise LocalProtocolError("header-size", f"a header of {len(header)} bytes is too large")
    head = _LENGTH.pack(len(header)) + header
    return [head + _padding(len(head)) if segments else head, *segments]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a contiguous tensor in bytes."""
    return math.prod(shape) * ITEM_SIZES[dtype]


# --- receiving -----------------------------------------------------------------------------------


def _malformed(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError("malformed", reason)


def decode(data: Buffer) -> Frame:
    """Read one frame; its tensors stay where they are in ``data``.

    Raises:
        RemoteProtocolError: anything else than a frame.
    """
    if len(data) > limits.MAX_FRAME_BYTES:
        raise RemoteProtocolError(
            "frame-size", f"a frame has at most {limits.MAX_FRAME_BYTES} bytes, not {len(data)}"
        )
    view = memoryview(data)
    if len(view) < _LENGTH.size:
        raise _malformed(f"a frame has at least {_LENGTH.size} bytes, not {len(view)}")
    (length,) = _LENGTH.unpack_from(view)
    if length > limits.MAX_HEADER_BYTES or _LENGTH.size + length > len(view):
        raise _malformed(f"a header of {length} bytes does not fit")
    end = _LENGTH.size + length
    header = _unpack(view[_LENGTH.size : end])
    if type(header) is not list or len(header) != 4:
        raise _malformed("a header is an array of four")
    seq, ack, messages, table = header
    if not (_is_number(seq) and _is_number(ack)):
        raise _malformed("seq and ack are unsigned integers")
    if type(messages) is not list or type(table) is not list:
        raise _malformed("messages and tensors are arrays")
    segments = view[min(len(view), end + -end % limits.ALIGNMENT) :] if table else view[end:]
    return Frame(seq, ack, messages, _entries(table, len(segments)), segments)


def _unpack(header: memoryview) -> Any:
    try:
        return msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_bin_len=64,
            max_str_len=limits.MAX_HEADER_BYTES,
            max_array_len=limits.MAX_HEADER_BYTES,
            max_map_len=4096,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise _malformed(f"the header is not msgpack: {type(error).__name__}") from None


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= limits.MAX_ID


def _entries(table: list[Any], available: int) -> tuple[Entry, ...]:
    entries, place = [], 0
    for raw in table:
        entry = _entry(raw)
        if entry.place >= 0:
            if entry.place != place:
                raise _malformed("segments lie one after the other")
            place += entry.nbytes + -entry.nbytes % limits.ALIGNMENT
        entries.append(entry)
    if place != available:
        raise _malformed(f"the segments need {place} bytes, and {available} came")
    return tuple(entries)


def _entry(raw: Any) -> Entry:
    if type(raw) is not list or len(raw) != 4:
        raise _malformed("a tensor's entry is an array of four")
    dtype, shape, place, nbytes = raw
    if type(dtype) is not str or dtype not in ITEM_SIZES:
        raise RemoteProtocolError("unknown-dtype", f"there is no dtype {str(dtype)[:40]!r}")
    if type(shape) is not list or len(shape) > limits.MAX_DIMENSIONS:
        raise _malformed(f"a shape is an array of at most {limits.MAX_DIMENSIONS} sizes")
    if not all(map(_is_number, shape)) or not _is_number(nbytes):
        raise _malformed("sizes are unsigned integers")
    if type(place) is not int or abs(place) > limits.MAX_ID:
        raise _malformed("a place is an integer")
    if nbytes > limits.MAX_TENSOR_BYTES or nbytes != tensor_bytes(dtype, shape):
        raise RemoteProtocolError(
            "tensor-size", f"{dtype}{shape} has not the {nbytes} bytes that its entry says"
        )
    return Entry(dtype, tuple(shape), place, nbytes)
