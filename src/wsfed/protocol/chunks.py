"""Large tensors: cut into chunks by the sender, put together by the receiver.

The sender announces a stream with its size; the receiver gets the memory for all of it at once,
so that each chunk is copied once, to where it belongs. Chunks come in order and without gaps: they
ride in the numbered stream of the session, which survives a cut.

A receiver that cannot take a tensor (its quota) does not break the session: the stream is read
and thrown away, and the command that wanted the tensor fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits

__all__ = ["Allocate", "Assembler", "cut"]

#: Gives writable memory of so many bytes, or ``None`` where there is none to give.
Allocate: TypeAlias = Callable[[int], memoryview | None]


def cut(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Chunks of ``data``, each with its offset."""
    for offset in range(0, len(data), limits.CHUNK_BYTES):
        yield offset, data[offset : offset + limits.CHUNK_BYTES]


@dataclass(slots=True)
class _Stream:
    memory: memoryview | None
    nbytes: int
    received: int = 0


class Assembler:
    """The receiving half: streams that were announced and not yet taken.

    Args:
        allocate: called with the size of each announced stream.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._streams: dict[int, _Stream] = {}

    @property
    def unfinished_bytes(self) -> int:
        """Memory held for streams that are still open, in bytes."""
        return sum(stream.nbytes for stream in self._streams.values() if stream.memory is not None)

    def open(self, stream: int, nbytes: int) -> None:
        """A stream is announced.

        Raises:
            RemoteProtocolError: known number, too many streams or too large.
        """
        if stream in self._streams:
            raise RemoteProtocolError("stream", f"stream {stream} is open already")
        if len(self._streams) >= limits.MAX_OPEN_STREAMS:
            raise RemoteProtocolError("stream", "too many open streams")
        if nbytes > limits.MAX_TENSOR_BYTES:
            raise RemoteProtocolError("tensor-size", f"a tensor of {nbytes} bytes is too large")
        self._streams[stream] = _Stream(self._allocate(nbytes), nbytes)

    def write(self, stream: int, offset: int, data: memoryview) -> None:
        """A chunk has come.

        Raises:
            RemoteProtocolError: unknown stream, a gap, or more than was announced.
        """
        into = self._streams.get(stream)
        if into is None:
            raise RemoteProtocolError("stream", f"stream {stream} is not open")
        if offset != into.received or offset + len(data) > into.nbytes:
            raise RemoteProtocolError(
                "stream", f"stream {stream} continues at {into.received}, not at {offset}"
            )
        if len(data) > limits.CHUNK_BYTES:
            raise RemoteProtocolError("stream", f"a chunk has at most {limits.CHUNK_BYTES} bytes")
        if into.memory is not None:
            into.memory[offset : offset + len(data)] = data
        into.received += len(data)

    def take(self, stream: int, nbytes: int) -> memoryview | None:
        """The memory of a complete stream, or ``None`` where there was no room for it.

        Raises:
            RemoteProtocolError: unknown, incomplete, or not of this size.
        """
        done = self._streams.pop(stream, None)
        if done is None or done.received != done.nbytes or done.nbytes != nbytes:
            raise RemoteProtocolError("stream", f"stream {stream} has not these {nbytes} bytes")
        return done.memory
