"""The numbered stream of a session: ordered, exactly once, over any number of connections.

The rules, for each direction on its own:

- Frames are numbered from 1 without gaps. A receiver takes the frame that is next, passes over
  the ones it has, and treats a gap as an error of the peer.
- Every frame says how far its sender has come with the *other* direction: ``ack`` is the last
  frame that has been **processed**, which for a command means that its replies left in
  this frame or before (:meth:`Sender.put_mark`). So a client that sees the acknowledgement has
  seen the replies, and the window (frames and bytes sent and not acknowledged) bounds what both
  sides hold.
- A sender keeps every frame until it is acknowledged. After a cut each side tells what it has
  *received*; the other one goes on behind that. Nothing is executed twice, nothing is lost.

The stream takes messages one by one and packs as many as are waiting into a frame. A tensor above
:data:`~wsfed.protocol.limits.INLINE_BYTES` leaves in chunks of its own before the message that
needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wsfed.errors import LocalProtocolError, RemoteProtocolError
from wsfed.protocol import limits, messages
from wsfed.protocol.chunks import Allocate, Assembler, cut
from wsfed.protocol.codec import Buffer, Frame, Outgoing, encode, pack

__all__ = ["Delivery", "Gate", "Incoming", "Receiver", "Sender"]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that has come: ``data`` is ``None`` where there was no room for it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: memoryview | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A frame's messages in order, to be processed and then acknowledged."""

    seq: int
    messages: list[Any]
    tensors: tuple[Incoming, ...]


class _Plain:
    """A message that waits and is nothing else: the commonest, made for each operation."""

    __slots__ = ("note", "packed")
    mark = gate = make = tensor = None

    def __init__(self, packed: bytes, note: Any) -> None:
        self.packed, self.note = packed, note


@dataclass(slots=True)
class _Item:
    """A message that waits. ``make`` is given where it needs its place in the tensor table."""

    packed: bytes
    note: Any = None
    mark: Callable[[], None] | None = None
    gate: Gate | None = None
    make: Callable[[int], list[Any]] | None = None
    tensor: Outgoing | None = None


@dataclass(frozen=True, slots=True)
class _Sent:
    seq: int
    size: int
    buffers: list[Buffer]


class Gate:
    """A place in the queue that holds back what is behind it.

    Attributes:
        is_open: set once; the queue goes on.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.items: list[_Item] = []

    def put(self, message: list[Any]) -> None:
        """A message that leaves in the gate's place, when it opens."""
        self.items.append(_Item(pack(message)))

    def put_tensor(self, make: Callable[[int], list[Any]], tensor: Outgoing) -> None:
        """The same for a message that carries a tensor."""
        self.items.append(_Item(pack(make(0)), make=make, tensor=tensor))


#: What a tensor's entry in the table takes at most, beside its sizes of nine bytes each.
_ENTRY_BYTES = 48
_MOST_PACKED = limits.MAX_HEADER_BYTES - 2048


class Sender:
    """The sending half. ``put`` may be called from any thread, everything else from one.

    Attributes:
        sent: number of the last frame that left.
        acknowledged: number of the last frame that the peer has processed.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.acknowledged = 0
        self._queue: deque[_Item | _Plain] = deque()
        self._unacknowledged: deque[_Sent] = deque()
        self._again: deque[_Sent] = deque()
        self._notes: dict[int, Sequence[Any]] = {}
        self._in_flight = 0
        # Two counters, so that each is written by one thread.
        self._put_bytes = 0
        self._left_bytes = 0
        self._streams = 0
        self._upload: tuple[int, Iterator[tuple[int, memoryview]]] | None = None
        self._uploaded: int = 0

    # --- putting ---

    def put(self, message: list[Any], note: Any = None) -> None:
        """Queue a message.

        Args:
            message: in wire form.
            note: kept while an answer may come (:meth:`note`).

        Raises:
            LocalProtocolError: it has no wire form, or is larger than a frame may be.
        """
        packed = pack(message)
        if len(packed) > _MOST_PACKED:
            raise LocalProtocolError(
                "message-size",
                f"a message of {len(packed):,} bytes is above {_MOST_PACKED:,}; send lists of "
                "numbers as a tensor",
            )
        self._put_bytes += len(packed)
        self._queue.append(_Plain(packed, note))

    def put_tensor(
        self, make: Callable[[int], list[Any]], tensor: Outgoing, note: Any = None
    ) -> None:
        """Queue a message that carries a tensor.

        Args:
            make: gives the message for the tensor's place in the table.
            tensor: its bytes, which must not change any more.
            note: as for :meth:`put`.
        """
        if len(tensor.data) > limits.MAX_TENSOR_BYTES:
            raise LocalProtocolError("tensor-size", f"{len(tensor.data):,} bytes are too many")
        item = _Item(pack(make(0)), note, make=make, tensor=tensor)
        self._put_bytes += len(item.packed) + len(tensor.data)
        self._queue.append(item)

    def put_mark(self, mark: Callable[[], None]) -> None:
        """Queue no message but a call, made when everything put before it has left or leaves."""
        self._queue.append(_Item(b"", mark=mark))

    def put_gate(self) -> Gate:
        """Queue a gate: what is put behind it does not leave before the gate is opened."""
        gate = Gate()
        self._queue.append(_Item(b"", gate=gate))
        return gate

    # --- sending ---

    @property
    def idle(self) -> bool:
        """Nothing waits and everything is acknowledged."""
        return not self._queue and not self._unacknowledged and self._upload is None

    @property
    def has_more(self) -> bool:
        """Something waits to leave, whether or not the window lets it."""
        return bool(self._queue or self._again or self._upload)

    @property
    def waiting(self) -> int:
        """Bytes that were put and have not left yet."""
        return self._put_bytes - self._left_bytes

    @property
    def backlog(self) -> int:
        """Bytes that the peer has not acknowledged, waiting ones included."""
        return self._in_flight + self._put_bytes - self._left_bytes

    def next_frame(self, ack: Callable[[], int]) -> list[Buffer] | None:
        """The next frame to send, or ``None`` where nothing waits or the window is closed.

        Args:
            ack: tells what the frame acknowledges, asked once it is known what the frame holds.
        """
        if self._again:
            return self._again.popleft().buffers
        if self._unacknowledged and (
            self._in_flight >= limits.WINDOW_BYTES
            or len(self._unacknowledged) >= limits.WINDOW_FRAMES
        ):
            return None
        self._pass_marks()
        return self._next_chunk(ack) or self._next_batch(ack)

    def _pass_marks(self) -> None:
        """Make the calls and go through the open gates at the head of the queue."""
        while self._queue:
            item = self._queue[0]
            if item.mark is not None:
                self._queue.popleft()
                item.mark()
            elif item.gate is not None and item.gate.is_open:
                self._queue.popleft()
                self._queue.extendleft(reversed(item.gate.items))
            else:
                return

    def _next_chunk(self, ack: Callable[[], int]) -> list[Buffer] | None:
        if self._upload is None:
            tensor = self._queue[0].tensor if self._queue else None
            if tensor is None or not _is_large(tensor) or self._uploaded:
                return None
            return self._begin_upload(tensor, ack)
        stream, chunks = self._upload
        piece = next(chunks, None)
        if piece is None:
            self._upload, self._uploaded = None, stream
            return None
        return self._emit_chunk([], stream, piece, ack)

    def _begin_upload(self, tensor: Outgoing, ack: Callable[[], int]) -> list[Buffer]:
        self._streams += 1
        chunks = cut(tensor.data)
        self._upload = self._streams, chunks
        announcement = messages.OpenStream(self._streams, len(tensor.data))
        return self._emit_chunk([pack(announcement.wire())], self._streams, next(chunks), ack)

    def _emit_chunk(
        self,
        before: list[bytes],
        stream: int,
        piece: tuple[int, memoryview],
        ack: Callable[[], int],
    ) -> list[Buffer]:
        offset, data = piece
        chunk = pack(messages.Chunk(stream, offset, 0).wire())
        return self._emit([*before, chunk], [Outgoing("uint8", (len(data),), data)], ack, ())

    def _next_batch(self, ack: Callable[[], int]) -> list[Buffer] | None:
        packed: list[bytes] = []
        tensors: list[Outgoing] = []
        notes: list[Any] = []
        header = inline = 0
        while True:
            # A mark behind the last message goes with it: the acknowledgement is in this frame.
            self._pass_marks()
            item = self._queue[0] if self._queue else None
            if item is None or item.gate is not None:
                break
            tensor = item.tensor
            if tensor is None:
                size, extra = len(item.packed), 0
            elif not _is_large(tensor):
                size = len(item.packed) + _ENTRY_BYTES + 9 * len(tensor.shape)
                extra = len(tensor.data) + limits.ALIGNMENT
            elif self._uploaded:  # its chunks have left
                tensor = Outgoing(tensor.dtype, tensor.shape, tensor.data, self._uploaded)
                size, extra = len(item.packed) + _ENTRY_BYTES + 9 * len(tensor.shape), 0
            else:  # its chunks leave first, and this batch before them
                break
            if packed and (
                header + size > limits.BATCH_BYTES or inline + extra > limits.INLINE_BYTES
            ):
                break
            self._queue.popleft()
            self._left_bytes += len(item.packed) + (len(tensor.data) if tensor else 0)
            header, inline = header + size, inline + extra
            notes.append(item.note)
            if item.make is None or tensor is None:
                packed.append(item.packed)
                continue
            if tensor.stream:
                self._uploaded = 0
            packed.append(pack(item.make(len(tensors))))
            tensors.append(tensor)
        return self._emit(packed, tensors, ack, notes) if packed else None

    def _emit(
        self,
        packed: list[bytes],
        tensors: list[Outgoing],
        ack: Callable[[], int],
        notes: Sequence[Any],
    ) -> list[Buffer]:
        buffers = encode(self.sent + 1, ack(), packed, tensors)
        self.sent += 1
        size = sum(map(len, buffers))
        self._in_flight += size
        self._unacknowledged.append(_Sent(self.sent, size, buffers))
        if any(note is not None for note in notes):
            self._notes[self.sent] = notes
        return buffers

    # --- what the peer says ---

    def acknowledge(self, ack: int) -> None:
        """The peer has processed everything up to frame ``ack``.

        Raises:
            RemoteProtocolError: that frame was never sent.
        """
        if ack > self.sent:
            raise RemoteProtocolError("ack", f"frame {ack} was never sent (last {self.sent})")
        # Notes are kept for one acknowledgement longer: the replies that need them come with it.
        while self._notes and (oldest := next(iter(self._notes))) <= self.acknowledged:
            del self._notes[oldest]
        while self._unacknowledged and self._unacknowledged[0].seq <= ack:
            self._in_flight -= self._unacknowledged.popleft().size
        while self._again and self._again[0].seq <= ack:
            self._again.popleft()
        self.acknowledged = max(self.acknowledged, ack)

    def check_resume(self, received: int) -> None:
        """Whether a peer that has received up to ``received`` can go on.

        Raises:
            RemoteProtocolError: it cannot: it has forgotten frames, or claims what never left.
        """
        if not self.acknowledged <= received <= self.sent:
            raise RemoteProtocolError(
                "resume",
                f"the peer has {received} frames, outside {self.acknowledged} to {self.sent}",
            )

    def rewind(self, received: int) -> None:
        """After a cut: send again what the peer has not received."""
        self.check_resume(received)
        self._again = deque(sent for sent in self._unacknowledged if sent.seq > received)

    def note(self, seq: int, index: int) -> Any:
        """The note of a message, while what answers it may still come; else ``None``."""
        notes = self._notes.get(seq, ())
        return notes[index] if index < len(notes) else None


def _is_large(tensor: Outgoing) -> bool:
    return len(tensor.data) > limits.INLINE_BYTES - limits.ALIGNMENT


class Receiver:
    """The receiving half.

    Args:
        allocate: gives memory for a large tensor.

    Attributes:
        received: number of the last frame taken.
        processed: number of the last frame up to which everything is done.
    """

    def __init__(self, allocate: Allocate) -> None:
        self.received = 0
        self.processed = 0
        self._assembler = Assembler(allocate)
        #: Frames taken and not processed, oldest first: seq, size, done.
        self._open: dict[int, tuple[int, bool]] = {}
        self._open_bytes = 0
        self._told = 0
        self._untold_bytes = 0

    @property
    def unfinished_bytes(self) -> int:
        """Memory held for large tensors that are on their way."""
        return self._assembler.unfinished_bytes

    def take(self, frame: Frame, size: int) -> Delivery | None:
        """A numbered frame has come; ``None`` where it is known or holds nothing to deliver.

        Raises:
            RemoteProtocolError: a gap, a stream out of order, or more than the window allows.
        """
        if frame.seq <= self.received:
            return None
        if frame.seq != self.received + 1:
            raise RemoteProtocolError(
                "gap", f"frame {frame.seq} came where {self.received + 1} was due"
            )
        if (
            len(self._open) >= limits.WINDOW_FRAMES
            or self._open_bytes >= limits.WINDOW_BYTES + limits.MAX_FRAME_BYTES
        ):
            raise RemoteProtocolError("window", "more frames than the window allows")
        rest = [raw for raw in frame.messages if not self._is_stream(raw, frame)]
        # Where a tensor is named twice both names mean the same memory.
        tensors = tuple(self._incoming(frame, entry) for entry in frame.tensors) if rest else ()
        self.received = frame.seq
        self._open[frame.seq] = (size, False)
        self._open_bytes += size
        if rest:
            return Delivery(frame.seq, rest, tensors)
        self.done(frame.seq)
        return None

    def _is_stream(self, raw: Any, frame: Frame) -> bool:
        code = raw[0] if type(raw) is list and raw else None
        if code == messages.OpenStream.code:
            opened = messages.parse(raw, (messages.STREAM,))
            assert isinstance(opened, messages.OpenStream)
            self._assembler.open(opened.stream, opened.nbytes)
            return True
        if code == messages.Chunk.code:
            chunk = messages.parse(raw, (messages.STREAM,))
            assert isinstance(chunk, messages.Chunk)
            if chunk.tensor >= len(frame.tensors) or frame.tensors[chunk.tensor].place < 0:
                raise RemoteProtocolError("stream", "a chunk lies in its own frame")
            data = frame.segment(frame.tensors[chunk.tensor])
            self._assembler.write(chunk.stream, chunk.offset, data)
            return True
        return False

    def _incoming(self, frame: Frame, entry: Any) -> Incoming:
        data = (
            frame.segment(entry)
            if entry.place >= 0
            else self._assembler.take(-entry.place, entry.nbytes)
        )
        return Incoming(entry.dtype, entry.shape, entry.nbytes, data)

    def done(self, seq: int) -> None:
        """Frame ``seq`` is processed: its replies are in the other direction's queue."""
        self._open[seq] = (self._open[seq][0], True)
        while self._open:
            first = next(iter(self._open))
            size, finished = self._open[first]
            if not finished:
                break
            del self._open[first]
            self._open_bytes -= size
            self._untold_bytes += size
            self.processed = first

    def told(self) -> None:
        """The peer is being told how far this side is."""
        self._told = self.processed
        self._untold_bytes = 0

    @property
    def owes_ack(self) -> bool:
        """So much is processed and not told that the peer should hear of it by itself."""
        return (
            self.processed - self._told >= limits.ACK_EVERY_FRAMES
            or self._untold_bytes >= limits.ACK_EVERY_BYTES
        )

    @property
    def untold(self) -> bool:
        """Anything is processed that the peer was not told."""
        return self.processed > self._told
