"""A session as a node hosts it: its thread, its deadline, and its connection of the moment."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer
from wsfed.protocol.session import Role, Session, State
from wsfed.tensors import allocate
from wsfed.transport.pump import pump
from wsfed.transport.wire import Wire
from wsfed.worker.executor import Executor
from wsfed.worker.interpreter import Carry, Interpreter, Outcome
from wsfed.worker.session import (
    Arrived,
    CancelUpTo,
    Close,
    Done,
    Event,
    Expect,
    Instruction,
    PeerLost,
    Run,
    StopRun,
    Tick,
    WorkerSession,
)

__all__ = ["Attached", "Hosted", "Keeper"]

_log = logging.getLogger("wsfed.node")

#: A client that is told goodbye reads it within this time, or is cut off.
_GOODBYE_SECONDS: Final = 3.0
#: What is answered at once where the session's thread is idle: so few of these, of so many bytes.
#: No deletes: a small tensor may hold a large graph, which takes time to free.
_READS: Final = frozenset({m.Flush, m.Get})
_FEW: Final = 8
_SMALL: Final = 4096


class Keeper(Protocol):
    """What a hosted session needs of its node."""

    id: str
    device: torch.device

    def forget(self, hosted: Hosted) -> None:
        """The session is over."""

    def expect(self, hosted: Hosted, ticket: bytes, ids: Sequence[int]) -> None:
        """Another worker will bring these objects."""

    def carry(self, hosted: Hosted, job: Carry) -> None:
        """Take tensors to another worker."""


class Hosted:
    """A session, the thread that runs it, and the connection it has at the moment."""

    def __init__(
        self,
        node: Keeper,
        interpreter: Interpreter,
        executor: Executor,
        only: frozenset[int] | None = None,
    ) -> None:
        self.node, self.interpreter, self.executor = node, interpreter, executor
        #: Sessions that bring tensors to this one; they use its thread, and end with it.
        self.guests: weakref.WeakSet[Hosted] = weakref.WeakSet()
        self._is_guest = only is not None
        self.protocol = Session(Role.WORKER, self._allocate)
        self._session = WorkerSession(self.protocol, only=only)
        self._cancelled = 0
        self._is_reading = False
        self._loop = asyncio.get_running_loop()
        self._attached: Attached | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def _allocate(self, nbytes: int) -> memoryview | None:
        unfinished = self.protocol.receiver.unfinished_bytes
        return allocate(nbytes) if self.interpreter.store.has_room(unfinished + nbytes) else None

    # --- connections ---

    def attach(self) -> Attached:
        """A connection is there."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._attached = Attached(self)
        return self._attached

    async def fence(self) -> None:
        """Another connection takes over: end the one there is."""
        if self._attached is not None:
            await self._attached.fence()

    def detach(self, attached: Attached) -> None:
        """A connection has ended."""
        if self._attached is not attached:
            return
        self._attached = None
        if self.protocol.state is State.LIVE:
            self.handle(PeerLost())
            self._expiry = self._loop.call_later(limits.SESSION_TTL_SECONDS, self._expire)

    def _expire(self) -> None:
        self.handle(Tick())

    def say_goodbye(self, reason: str) -> None:
        """End the session, telling the client."""
        self.protocol.end(reason)
        self._wake()

    def refuse(self, error: RemoteProtocolError) -> None:
        """End the session because the client sent what is no message."""
        self.protocol.refuse(error.code, error.reason)
        self.node.forget(self)

    async def left(self) -> None:
        """Wait until the connection is closed, and close it if the client does not read."""
        if (attached := self._attached) is None:
            return
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await attached.done.wait()
        except TimeoutError:
            await attached.fence()

    def _wake(self) -> None:
        if self._attached is not None:
            self._attached.wake.set()

    # --- events in, instructions out ---

    def handle(self, event: Event) -> None:
        """Feed the session and do what it says."""
        for instruction in self._session.handle(event, _now()):
            self._follow(instruction)
        self._wake()

    def _follow(self, instruction: Instruction) -> None:
        match instruction:
            case Run() if self._is_light(instruction):
                self._is_reading = True
                try:
                    self.handle(Done(self._run(instruction)))
                finally:
                    self._is_reading = False
            case Run():
                self.executor.submit(lambda: self._work(instruction))
            case CancelUpTo(seq):
                self._cancelled = max(self._cancelled, seq)
            case StopRun(request):
                self.interpreter.stop(request)
            case Expect(ticket, ids):
                self.node.expect(self, ticket, ids)
            case Carry():
                self.node.carry(self, instruction)
            case Close(reason, forget):
                self._close(reason, forget)

    def _close(self, reason: str, forget: bool) -> None:
        _log.info("worker %s: a connection ends: %s", self.node.id, reason)
        if forget:
            self.node.forget(self)
        if self._attached is not None:
            self._attached.closing = True

    def _is_light(self, run: Run) -> bool:
        """Whether this only tells of small things that are there: a thread would take longer."""
        if self._is_reading or len(run.commands) > _FEW or not self.executor.is_idle:
            return False
        is_read = all(type(command) in _READS for command in run.commands)
        return is_read and self._are_small(run)

    def _are_small(self, run: Run) -> bool:
        if self.node.device.type != "cpu":
            return False
        wanted = [command.id for command in run.commands if type(command) is m.Get]
        return all(self.interpreter.store.nbytes(id) <= _SMALL for id in wanted)

    def _work(self, run: Run) -> None:
        """In the executor's thread."""
        self._report(self._run(run))

    def _run(self, run: Run) -> Outcome:
        return self.interpreter.run(
            0 if self._is_guest else run.seq,  # the frames that failures name are the client's
            run.commands,
            run.tensors,
            run.start,
            run.budget,
            lambda: run.seq <= self._cancelled or self.executor.ending,
        )

    def _report(self, outcome: Outcome) -> None:
        try:
            self._loop.call_soon_threadsafe(self._reported, outcome)
        except RuntimeError:
            _log.debug("the event loop ended before the work did")

    def _reported(self, outcome: Outcome) -> None:
        try:
            self.handle(Done(outcome))
        except Exception:  # else the client would wait for ever for what does not go on
            _log.exception("worker %s: a session cannot go on", self.node.id)
            self.refuse(RemoteProtocolError("internal", "the worker failed; its log says how"))
            self._wake()


class Attached:
    """A connection of a hosted session (:class:`~wsfed.transport.pump.End`)."""

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self.wake = asyncio.Event()
        self.done = asyncio.Event()
        self.closing = False
        self._fenced = False
        self._wire: Wire | None = None

    async def run(self, wire: Wire) -> None:
        """Until the connection ends."""
        self._wire = wire
        try:
            await pump(wire, self)
        finally:
            self.done.set()
            self._hosted.detach(self)

    async def fence(self) -> None:
        """End at once, even in the middle of a message that nobody reads."""
        self._fenced = True
        self.wake.set()
        if self._wire is not None:
            await self._wire.close("cut off by the worker")
        await self.done.wait()

    @property
    def over(self) -> bool:
        """See :class:`~wsfed.transport.pump.End`."""
        return self._fenced or self.closing or self._hosted.protocol.state is State.GONE

    def leave(self) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        if self._hosted.protocol.state is not State.GONE:
            self._hosted.say_goodbye("the worker's program has ended")

    @property
    def next_tick(self) -> float | None:
        """See :class:`~wsfed.transport.pump.End`."""
        return None if self._fenced else self._hosted.protocol.next_tick

    def next_frame(self, now: float) -> Sequence[Buffer] | None:
        """See :class:`~wsfed.transport.pump.End`."""
        return None if self._fenced else self._hosted.protocol.next_frame(now)

    def arrived(self, data: Buffer, now: float) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        if not self._fenced:
            self._hosted.handle(Arrived(data))

    def broken(self, error: Exception, now: float) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        if isinstance(error, RemoteProtocolError):
            self._hosted.refuse(error)
        else:
            _log.error("a connection broke", exc_info=error)
        self.closing = True
        self.wake.set()

    def tick(self, now: float) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        self._hosted.handle(Tick())


def _now() -> float:
    return asyncio.get_running_loop().time()
