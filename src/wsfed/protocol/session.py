"""A session from the first hello to the last goodbye, as a pure state machine.

A session is an ordered stream of commands with a state of its own on the worker. It is made by a
``hello``, survives any number of connections, and ends by a goodbye, a protocol error, or by
staying without a connection for longer than its time to live.

- ``hello`` → ``welcome{session, token, epoch}``. ``epoch`` is random per worker process, so a
  restarted worker is told apart from a gap.
- After a cut: ``resume{session, token, epoch, received}`` → ``resumed{received, token}``, and both
  sides send again what the other has not received; or ``session_lost{reason}``. Each resume hands
  out a new token; the one before stays good until the peer has shown that it knows the new one,
  because the answer may be lost in the next cut.
- A second connection for a session that has one takes over, and the first one is fenced off.
- Liveness is progress: any frame counts. A side that has been idle for a heartbeat asks for an
  acknowledgement; a side that has heard nothing for four of them reports :class:`Silent`.

Time is an argument everywhere (seconds of a monotonic clock). Neither sockets nor tasks are known
here: the owner feeds bytes to :meth:`Session.receive`, sends what :meth:`Session.next_frame`
gives, and calls :meth:`Session.tick` at :attr:`Session.next_tick`.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from wsfed.errors import LocalProtocolError, RemoteProtocolError
from wsfed.protocol import limits, messages
from wsfed.protocol.chunks import Allocate
from wsfed.protocol.codec import Buffer, Frame, decode, encode, pack
from wsfed.protocol.stream import Delivery, Receiver, Sender

__all__ = [
    "TRANSITIONS",
    "CancelAsked",
    "Ended",
    "Event",
    "Lost",
    "Opened",
    "RefusedByPeer",
    "Role",
    "Session",
    "Silent",
    "State",
    "StopAsked",
    "read_greeting",
]


class Role(Enum):
    """Which half of the conversation a machine plays."""

    CLIENT = "client"
    WORKER = "worker"


class State(Enum):
    """Where a session stands."""

    IDLE = "idle"  # no connection yet
    GREETING = "greeting"  # client: hello sent
    LIVE = "live"  # connected, frames flow
    DETACHED = "detached"  # the connection is cut, the session is kept
    RESUMING = "resuming"  # client: resume sent
    GONE = "gone"  # over; nothing is kept


class Input(Enum):
    """What moves a session from one state to another."""

    CONNECT = "connect"
    WELCOME = "welcome"
    RESUME = "resume"
    RESUMED = "resumed"
    CUT = "cut"
    END = "end"  # goodbye, session lost, refused, expired


def _table() -> Mapping[tuple[Role, State, Input], State]:
    client, worker = Role.CLIENT, Role.WORKER
    table = {
        (client, State.IDLE, Input.CONNECT): State.GREETING,
        (client, State.GREETING, Input.WELCOME): State.LIVE,
        (client, State.GREETING, Input.CUT): State.IDLE,
        (client, State.LIVE, Input.CUT): State.DETACHED,
        (client, State.DETACHED, Input.CONNECT): State.RESUMING,
        (client, State.RESUMING, Input.RESUMED): State.LIVE,
        (client, State.RESUMING, Input.CUT): State.DETACHED,
        (worker, State.IDLE, Input.CONNECT): State.LIVE,
        (worker, State.LIVE, Input.CUT): State.DETACHED,
        (worker, State.LIVE, Input.RESUME): State.LIVE,  # takes over
        (worker, State.DETACHED, Input.RESUME): State.LIVE,
    }
    for role in Role:
        for state in State:
            table[role, state, Input.END] = State.GONE
    return MappingProxyType(table)


#: Every move there is. What is not in it is an error of whoever asked for it.
TRANSITIONS: Final = _table()


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is live; ``resumed`` tells whether it was so before."""

    worker: str
    info: Mapping[str, Any]
    resumed: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker has no such session."""

    reason: str


@dataclass(frozen=True, slots=True)
class RefusedByPeer:
    """The peer ended the connection because of what this side did."""

    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer said goodbye."""

    reason: str


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The client gave up every command up to frame ``seq`` that has not started."""

    seq: int


@dataclass(frozen=True, slots=True)
class Silent:
    """Nothing came for too long: the connection should be closed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The client wants a run over a data set to end with the batch that is being worked on."""

    request: int


Event: TypeAlias = (
    Opened | Delivery | Lost | RefusedByPeer | Ended | CancelAsked | StopAsked | Silent
)


def read_greeting(data: Buffer) -> messages.Hello | messages.Resume:
    """The first message on a connection, as a worker reads it.

    Raises:
        RemoteProtocolError: anything else, or a version this side does not speak.
    """
    frame = decode(data)
    if frame.seq or len(frame.messages) != 1:
        raise RemoteProtocolError("unexpected", "a connection begins with hello or resume")
    message = messages.parse(frame.messages[0], (messages.CONTROL,))
    if not isinstance(message, messages.Hello | messages.Resume):
        raise RemoteProtocolError("unexpected", "a connection begins with hello or resume")
    if message.version != messages.VERSION:
        raise RemoteProtocolError(
            "version",
            f"this worker speaks version {messages.VERSION} of the protocol, "
            f"not {message.version}; install the same release of wsfed on both sides",
        )
    return message


class Session:
    """One end of a session.

    Args:
        role: which end.
        allocate: gives memory for a large tensor that comes in.
        random: gives so many random bytes.

    Attributes:
        state: where the session stands.
        id: set by the welcome.
        epoch: of the worker process; set by the welcome.
        sender: put messages here.
        receiver: report processed frames here (:meth:`processed`).
    """

    def __init__(
        self,
        role: Role,
        allocate: Allocate,
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
        heartbeat: float = limits.HEARTBEAT_SECONDS,
        silence: float = limits.SILENCE_SECONDS,
    ) -> None:
        self.role = role
        self.state = State.IDLE
        self.id = b""
        self.epoch = b""
        self.sender = Sender()
        self.receiver = Receiver(allocate)
        self._random = random
        self._heartbeat, self._silence = heartbeat, silence
        self._token = b""
        self._previous_token: bytes | None = None
        self._control: deque[list[Buffer]] = deque()
        self._ack_due: float | None = None
        self._heard = self._said = self.detached_at = 0.0

    # --- connections ---

    def hello(self, now: float, *, token: str | None, ticket: bytes | None, client: str) -> None:
        """Client: a connection is there; begin, or resume what was begun."""
        fresh = self.state is State.IDLE
        self._begin(Input.CONNECT, now)
        greeting: messages.Message = (
            messages.Hello(messages.VERSION, token, ticket, client)
            if fresh
            else messages.Resume(
                messages.VERSION, self.id, self._token, self.epoch, self.receiver.received
            )
        )
        self._say(greeting)

    def welcome(self, now: float, *, epoch: bytes, worker: str, info: dict[str, Any]) -> None:
        """Worker: a hello came; the session begins."""
        self._begin(Input.CONNECT, now)
        self.id, self._token, self.epoch = self._random(16), self._random(16), epoch
        self._say(messages.Welcome(self.id, self._token, epoch, worker, info))

    def resume(self, asked: messages.Resume, now: float) -> None:
        """Worker: a resume came for this session.

        Raises:
            RemoteProtocolError: wrong token, or a peer that has forgotten what it received.
        """
        if not self.knows(asked.token):
            raise RemoteProtocolError("token", "the token does not belong to the session")
        self.sender.check_resume(asked.received)
        self._begin(Input.RESUME, now)
        self.sender.rewind(asked.received)
        self._previous_token, self._token = asked.token, self._random(16)
        self._say(messages.Resumed(self.receiver.received, self._token))

    def knows(self, token: bytes) -> bool:
        """Whether a resume with this token is this session's."""
        good = hmac.compare_digest(token, self._token)
        before = self._previous_token
        return good or (before is not None and hmac.compare_digest(token, before))

    def cut(self, now: float) -> None:
        """The connection is gone."""
        if self.state is State.GONE:
            return
        self._move(Input.CUT)
        self._control.clear()
        self.detached_at = now

    def end(self, reason: str | None = None) -> None:
        """The session is over; with a reason the peer is told."""
        if self.state is State.LIVE and reason is not None:
            self._say(messages.Goodbye(reason))
        self._move(Input.END)

    def refuse(self, error: str, reason: str) -> None:
        """The peer broke the rules: tell it, and end."""
        self._say(messages.Refused(error, reason[: limits.MAX_TEXT]))
        self._move(Input.END)

    def _begin(self, given: Input, now: float) -> None:
        self._move(given)
        self._control.clear()
        self._heard = self._said = now

    def _move(self, given: Input) -> None:
        to = TRANSITIONS.get((self.role, self.state, given))
        if to is None:
            raise LocalProtocolError(
                "state", f"a {self.role.value} that is {self.state.value} cannot {given.value}"
            )
        self.state = to

    # --- sending ---

    def cancel(self) -> None:
        """Client: give up every command that was sent and has not started."""
        self._say(messages.Cancel(self.sender.sent))

    def stop(self, request: int) -> None:
        """Client: end a run over a data set with the batch that is being worked on."""
        self._say(messages.Stop(request))

    @property
    def has_control(self) -> bool:
        """Whether something waits that belongs to the session and not to its stream."""
        return bool(self._control)

    def request_ack(self, now: float) -> None:
        """Tell the peer before long how far this side is, even if nothing else is to be said."""
        if self._ack_due is None:
            self._ack_due = now + limits.ACK_SECONDS

    def _say(self, message: messages.Message) -> None:
        self._control.append(encode(0, self.receiver.processed, [pack(message.wire())]))

    def next_frame(self, now: float) -> list[Buffer] | None:
        """The next frame to send on the connection, or ``None``."""
        frame = self._next(now)
        if frame is not None:
            self._said = now
        return frame

    def _next(self, now: float) -> list[Buffer] | None:
        if self._control:
            return self._control.popleft()
        if self.state is not State.LIVE:
            return None
        frame = self.sender.next_frame(self._tell)
        is_due = self._ack_due is not None and now >= self._ack_due
        if frame is None and (self.receiver.owes_ack or (is_due and self.receiver.untold)):
            frame = encode(0, self._tell(), [pack(messages.Ack().wire())])
        elif is_due:
            self._ack_due = None
        return frame

    def _tell(self) -> int:
        self.receiver.told()
        self._ack_due = None
        return self.receiver.processed

    # --- receiving ---

    def receive(self, data: Buffer, now: float) -> list[Event]:
        """A frame has come: what it means, in order.

        Raises:
            RemoteProtocolError: the peer broke the rules; :meth:`refuse` it.
        """
        self._heard = now
        frame = decode(data)
        if frame.seq == 0:
            return self._control_frame(frame)
        if self.state is not State.LIVE:
            raise RemoteProtocolError("unexpected", "the handshake comes first")
        self._previous_token = None
        self.sender.acknowledge(frame.ack)
        delivery = self.receiver.take(frame, len(data))
        return [delivery] if delivery else []

    def _control_frame(self, frame: Frame) -> list[Event]:
        if len(frame.messages) != 1 or frame.tensors:
            raise RemoteProtocolError("malformed", "a control frame holds one message")
        message = messages.parse(frame.messages[0], (messages.CONTROL,))
        event = self._control_message(message)
        if self.state is State.LIVE and not isinstance(event, Opened):
            self._previous_token = None
            self.sender.acknowledge(frame.ack)
        return [event] if event else []

    def _control_message(self, message: messages.Message) -> Event | None:
        client = self.role is Role.CLIENT
        match message:
            case messages.Ack():
                return None
            case messages.Ping():
                self._say(messages.Ack())
                return None
            case messages.Cancel(seq) if not client and self.state is State.LIVE:
                return CancelAsked(seq)
            case messages.Stop(request) if not client and self.state is State.LIVE:
                return StopAsked(request)
            case messages.Welcome() if client and self.state is State.GREETING:
                self._move(Input.WELCOME)
                self.id, self._token, self.epoch = message.session, message.token, message.epoch
                return Opened(message.worker, message.info, resumed=False)
            case messages.Resumed() if client and self.state is State.RESUMING:
                self.sender.rewind(message.received)
                self._move(Input.RESUMED)
                self._token = message.token
                return Opened("", {}, resumed=True)
            case messages.SessionLost(reason) if client:
                self._move(Input.END)
                return Lost(reason)
            case messages.Refused(error, reason):
                self._move(Input.END)
                return RefusedByPeer(error, reason)
            case messages.Goodbye(reason):
                self._move(Input.END)
                return Ended(reason)
        raise RemoteProtocolError("unexpected", f"{type(message).__name__} is not expected here")

    def processed(self, seq: int) -> None:
        """Frame ``seq`` is done; said to the peer behind everything that was put before."""
        self.sender.put_mark(lambda: self.receiver.done(seq))

    # --- time ---

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do, or ``None``."""
        if self.state in (State.GREETING, State.LIVE, State.RESUMING):
            due = min(self._said + self._heartbeat, self._heard + self._patience)
            is_owed = self._ack_due is not None and self.state is State.LIVE
            return min(due, self._ack_due) if is_owed else due  # type: ignore[type-var]
        return None

    @property
    def _patience(self) -> float:
        """A greeting is answered at once, or by nobody who speaks the protocol."""
        live = self.state is State.LIVE
        return self._silence if live else min(self._silence, limits.HANDSHAKE_SECONDS)

    def tick(self, now: float) -> list[Event]:
        """Time has passed."""
        if self.next_tick is None:
            return []
        if now - self._heard >= self._patience:
            return [Silent(now - self._heard)]
        if self.state is State.LIVE and now - self._said >= self._heartbeat:
            self._say(messages.Ping())
            self._said = now
        return []
