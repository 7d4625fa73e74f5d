"""What a worker does for one session, decided without I/O: events in, instructions out.

Events are a frame that arrived, work that is done, tensors that were carried, a lost peer, and the
passing of time. Instructions are to run commands, to expect or to carry tensors, and to close.
Replies are put into the protocol's own queue, from which the shell takes frames.

Rules:

- One run of commands at a time; the next starts when the one before is done.
- None starts while the client has more than ``REPLY_BACKLOG_BYTES`` of replies to fetch.
- A frame is reported as processed when its last command has run, behind its replies.
- Losing the peer stops nothing: the session goes on and its replies wait for a resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from wsfed.errors import LocalProtocolError, RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer
from wsfed.protocol.session import (
    CancelAsked,
    Ended,
    RefusedByPeer,
    Session,
    Silent,
    State,
    StopAsked,
)
from wsfed.protocol.stream import Delivery, Incoming
from wsfed.worker.interpreter import Carry, Outcome, Reply
from wsfed.worker.store import poison_of

__all__ = [
    "Arrived",
    "CancelUpTo",
    "Carried",
    "Close",
    "Done",
    "Event",
    "Expect",
    "Instruction",
    "PeerLost",
    "Run",
    "StopRun",
    "Tick",
    "WorkerSession",
]


# --- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A frame came from the client."""

    data: Buffer


@dataclass(frozen=True, slots=True)
class Done:
    """A :class:`Run` came to its end."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Carried:
    """Tensors arrived at the other worker, or ``error`` says why not."""

    carry: Carry
    error: Exception | None


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The connection is gone."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = Arrived | Done | Carried | PeerLost | Tick

# --- instructions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Run the commands of a frame from ``start`` on, and report :class:`Done`."""

    seq: int
    commands: Sequence[m.Message]
    tensors: Sequence[Incoming]
    start: int
    budget: int


@dataclass(frozen=True, slots=True)
class CancelUpTo:
    """Pass over commands of frames up to this one."""

    seq: int


@dataclass(frozen=True, slots=True)
class StopRun:
    """End the run over a data set that this request began, with the batch it is at."""

    request: int


@dataclass(frozen=True, slots=True)
class Expect:
    """Another worker will bring these objects."""

    ticket: bytes
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection; with ``forget`` the session is over."""

    reason: str
    forget: bool


Instruction: TypeAlias = Run | CancelUpTo | StopRun | Expect | Carry | Close


@dataclass(slots=True)
class _Frame:
    seq: int
    commands: list[m.Message]
    tensors: tuple[Incoming, ...]
    next: int = 0


#: What the one that brings tensors may say.
CARRIER: Final = (m.Store, m.Flush)


class WorkerSession:
    """The decisions.

    Args:
        protocol: the worker's end of the session.
        only: for a session that brings tensors: the identifiers it may store, and nothing else.
        log: is told every event, so that a run can be played again.
    """

    def __init__(
        self,
        protocol: Session,
        *,
        only: frozenset[int] | None = None,
        log: Callable[[float, Event], Any] | None = None,
    ) -> None:
        self.protocol = protocol
        self._only = only
        self._log = log
        self._frames: deque[_Frame] = deque()
        self._running = False

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What to do because of an event.

        A peer that breaks the rules is an event like any other: the session is closed.
        """
        if self._log is not None:
            self._log(now, event)
        try:
            instructions = self._handle(event, now)
        except RemoteProtocolError as error:
            self._frames.clear()
            self.protocol.refuse(error.code, error.reason)
            return [Close(error.reason, forget=True)]
        return [*instructions, *self._start()]

    def _handle(self, event: Event, now: float) -> list[Instruction]:
        match event:
            case Arrived(data):
                return self._arrived(data, now)
            case Done(outcome):
                return self._done(outcome, now)
            case Carried(carry, error):
                self._carried(carry, error)
            case PeerLost():
                self.protocol.cut(now)
            case Tick():
                return self._tick(now)
        return []

    # --- events ---

    def _arrived(self, data: Buffer, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        for event in self.protocol.receive(data, now):
            match event:
                case Delivery():
                    instructions += self._delivered(event)
                case CancelAsked(seq):
                    instructions.append(CancelUpTo(seq))
                case StopAsked(request):
                    instructions.append(StopRun(request))
                case Ended(reason) | RefusedByPeer(_, reason):
                    self._frames.clear()
                    instructions.append(Close(reason, forget=True))
        return instructions

    def _delivered(self, delivery: Delivery) -> list[Instruction]:
        commands, instructions = [], list[Instruction]()
        for raw in delivery.messages:
            command = m.parse(raw, (m.COMMANDS,))
            self._check(command, delivery)
            if isinstance(command, m.Receive):
                instructions.append(Expect(command.ticket, command.ids))
            else:
                commands.append(command)
        self._frames.append(_Frame(delivery.seq, commands, delivery.tensors))
        return instructions

    def _check(self, command: m.Message, delivery: Delivery) -> None:
        if isinstance(command, m.Store | m.Define | m.RunOver) and command.tensor >= len(
            delivery.tensors
        ):
            name = type(command).__name__
            raise RemoteProtocolError("malformed", f"{name}.tensor is not in the frame's table")
        if self._only is not None and not (
            isinstance(command, CARRIER)
            and (not isinstance(command, m.Store) or command.id in self._only)
        ):
            raise RemoteProtocolError("unexpected", "this session only brings what is expected")

    def _done(self, outcome: Outcome, now: float) -> list[Instruction]:
        self._running = False
        if not self._frames:  # closed meanwhile
            return []
        for reply in outcome.replies:
            self._put(reply)
        frame = self._frames[0]
        frame.next = outcome.next
        if frame.next >= len(frame.commands):
            self._frames.popleft()
            self.protocol.processed(frame.seq)
            if not self._frames:
                self.protocol.request_ack(now)
        return list(outcome.carries)

    def _carried(self, carry: Carry, error: Exception | None) -> None:
        if error is None:
            self._put(Reply(m.ValueReply(carry.request, None)))
        else:
            failure = poison_of(error, "move", (), carry.at)
            self._put(
                Reply(m.RequestFailed(carry.request, failure.seq, failure.index, failure.wire()))
            )

    def _tick(self, now: float) -> list[Instruction]:
        if self.protocol.state is State.DETACHED:
            if now - self.protocol.detached_at >= limits.SESSION_TTL_SECONDS:
                self.protocol.end()
                return [Close("its time to live is over", forget=True)]
            return []
        for event in self.protocol.tick(now):
            if isinstance(event, Silent):
                return [Close(f"nothing came for {event.seconds:.0f} s", forget=False)]
        return []

    # --- running ---

    def _start(self) -> list[Instruction]:
        if self._running or not self._frames or self.protocol.state is State.GONE:
            return []
        room = limits.REPLY_BACKLOG_BYTES - self.protocol.sender.backlog
        if room <= 0:
            return []
        self._running = True
        frame = self._frames[0]
        return [Run(frame.seq, frame.commands, frame.tensors, frame.next, room)]

    def _put(self, reply: Reply) -> None:
        if self.protocol.state is State.GONE:
            return
        message = reply.message
        if reply.tensor is None:
            self._put_value(message)
        else:
            assert isinstance(message, m.TensorReply)
            self.protocol.sender.put_tensor(lambda place: message.wire(tensor=place), reply.tensor)

    def _put_value(self, message: m.Message) -> None:
        try:
            self.protocol.sender.put(message.wire())
        except LocalProtocolError as error:  # an answer larger than a frame
            assert isinstance(message, m.ValueReply)
            failure = poison_of(error, "reply", (), (0, 0))
            refusal = m.RequestFailed(message.request, 0, 0, failure.wire())
            self.protocol.sender.put(refusal.wire())
