"""Two ends of a session and the bytes between them, without a socket.

The bytes of each direction lie in one string, each frame behind its length, so that a cut can fall
on every byte: what lies before it and is whole has arrived, the rest is lost.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.session import Opened, Role, Session, State, read_greeting
from wsfed.protocol.stream import Delivery

EPOCH = b"e" * 16


def memory(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


class Numbers:
    """Random bytes that are the same in every run."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, count: int) -> bytes:
        self.given += 1
        return self.given.to_bytes(count, "big")


class Lane:
    """One direction: bytes sent, and how many may still pass before the cut."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.left: int | None = None

    def send(self, frame: bytes) -> None:
        self.data += struct.pack("<I", len(frame)) + frame

    def arrived(self) -> list[bytes]:
        """Whole frames within what may pass."""
        allowed = len(self.data) if self.left is None else min(self.left, len(self.data))
        frames, at = [], 0
        while at + 4 <= allowed:
            (length,) = struct.unpack_from("<I", self.data, at)
            if at + 4 + length > allowed:
                break
            frames.append(bytes(self.data[at + 4 : at + 4 + length]))
            at += 4 + length
        del self.data[:at]
        if self.left is not None:
            self.left -= at
        return frames


class Pair:
    """A client's and a worker's session, and a worker that counts what it executes."""

    def __init__(self) -> None:
        self.client = Session(Role.CLIENT, memory, random=Numbers())
        self.worker = Session(Role.WORKER, memory, random=Numbers())
        self.up, self.down = Lane(), Lane()
        self.now = 0.0
        self.executed: list[int] = []
        self.replies: list[int] = []
        self.values: list[bytes] = []
        self.connected = False
        self.bytes_up = 0
        self.bytes_down = 0

    def connect(self) -> None:
        self.up, self.down = Lane(), Lane()
        self.client.hello(self.now, token=None, ticket=None, client="test")
        self.connected = True

    def cut(self) -> None:
        self.connected = False
        self.client.cut(self.now)
        if self.worker.state is State.LIVE:
            self.worker.cut(self.now)

    def step(self) -> bool:
        """Everything both sides have to say once; false where nobody had anything."""
        moved = self._send(self.client, self.up)
        for frame in self.up.arrived():
            self.bytes_up += len(frame) + 4
            self._at_worker(frame)
        moved |= self._send(self.worker, self.down)
        for frame in self.down.arrived():
            self.bytes_down += len(frame) + 4
            self._at_client(frame)
        return moved

    def run(self) -> None:
        while self.step():
            pass

    def _send(self, end: Session, lane: Lane) -> bool:
        moved = False
        while (frame := end.next_frame(self.now)) is not None:
            lane.send(b"".join(frame))
            moved = True
        return moved

    def _at_worker(self, data: bytes) -> None:
        if self.worker.state in (State.IDLE, State.DETACHED):
            greeting = read_greeting(data)
            if isinstance(greeting, m.Hello):
                # A hello that comes again: the worker makes a new session.
                self.worker = Session(Role.WORKER, memory, random=Numbers())
                self.worker.welcome(self.now, epoch=EPOCH, worker="bob", info={})
            else:
                self.worker.resume(greeting, self.now)
            return
        for event in self.worker.receive(data, self.now):
            assert isinstance(event, Delivery)
            self._execute(event)

    def _execute(self, delivery: Delivery) -> None:
        for raw in delivery.messages:
            message = m.parse(raw, (m.COMMANDS,))
            match message:
                case m.Flush(request):
                    self.executed.append(request)
                    self.worker.sender.put(m.ValueReply(request, None).wire())
                case m.Store(id, place):
                    self.executed.append(id)
                    data = delivery.tensors[place].data
                    assert data is not None
                    self.values.append(bytes(data))
        self.worker.processed(delivery.seq)
        self.worker.request_ack(-limits.ACK_SECONDS)

    def _at_client(self, data: bytes) -> None:
        for event in self.client.receive(data, self.now):
            if isinstance(event, Opened):
                continue
            assert isinstance(event, Delivery)
            for raw in event.messages:
                reply = m.parse(raw, (m.REPLIES,))
                assert isinstance(reply, m.ValueReply)
                self.replies.append(reply.request)
            self.client.processed(event.seq)
            self.client.request_ack(-limits.ACK_SECONDS)


def put_flushes(session: Session, numbers: range) -> None:
    for number in numbers:
        session.sender.put(m.Flush(number).wire())


def always(value: object) -> Callable[[int], object]:
    return lambda _: value
