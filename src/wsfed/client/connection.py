"""The client's end of a session: commands out, replies in, one background task.

Pointers put commands in (:class:`~wsfed.pointers.link.Link`), from the event loop's thread or, in
the blocking world, from any other; the pump takes frames out
(:class:`~wsfed.transport.pump.End`). A connection that breaks is made again for a while and the
session resumed; what cannot be resumed ends every awaiting pointer with one typed error.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch

from wsfed.client.answers import check_tensor, check_value
from wsfed.client.failures import Failures
from wsfed.client.transfers import transfer
from wsfed.errors import (
    AuthenticationFailed,
    ConnectionLost,
    LocalProtocolError,
    NodeUnavailable,
    RemoteProtocolError,
    SessionLost,
    WsfedError,
)
from wsfed.pointers.link import Link
from wsfed.pointers.recording import NO_VALUES, Recording, recording_now
from wsfed.pointers.shapes import Meta
from wsfed.pointers.site import Site
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer, Outgoing
from wsfed.protocol.session import (
    Ended,
    Event,
    Lost,
    Opened,
    RefusedByPeer,
    Role,
    Session,
    Silent,
    State,
)
from wsfed.protocol.stream import Delivery, Gate, Incoming
from wsfed.tensors import allocate, incoming, outgoing
from wsfed.transport.pump import pump
from wsfed.transport.wire import Wire, WireLost

__all__ = ["Connection", "awaited"]

_log = logging.getLogger("wsfed.client")

#: Set where a program of the async world is run with blocking workers, for its tasks.
awaited: Final[ContextVar[bool]] = ContextVar("awaited", default=False)

_EXECUTE: Final = m.Execute.code

#: Deletes wait for company until there are so many, or of so many bytes, or until a frame leaves.
_DELETES: Final = 32
_DELETED_BYTES: Final = 2 * 1024 * 1024
#: Commands that nobody waits for leave together: one frame in so many seconds, unless there are so
#: many bytes of them.
_COMPANY: Final = 0.004
_COMPANY_BYTES: Final = 64 * 1024
#: The first wait before a connection is made again, and the longest, in seconds (full jitter).
_BACK_OFF: Final = (0.1, 30.0)
#: Turns of the loop in which a task that waits for this session hears of its end. What waits for
#: something else is cancelled then; who awaits a cancelled task would take it for their own end.
_TURNS: Final = 3


@dataclass(frozen=True, slots=True)
class _Request:
    """What is awaited, for the user's line, by a command of this code, of this kind."""

    future: asyncio.Future[Any]
    site: Site | None
    command: int
    meta: Meta | None
    progress: Callable[[m.Progress], None] | None = None


class Connection(Link):
    """One session on one worker.

    Args:
        url: where the worker is, for errors and for other workers.
        open_wire: makes a connection; raises ``WireLost``, or what it is no use to try again
            after.
        loop: where everything but ``issue`` and its like runs.
        token: shown to the worker.
        blocking: calls that bring something back return it instead of an awaitable; but see
            :data:`awaited`.
        reconnect: seconds to go on trying when a connection breaks.

    Attributes:
        url: see above.
        worker: what pointers give as their location; set by its maker.
        loop: see above.
        info: what the worker told about itself, once it is known.
        opened: done when the worker has welcomed this client.
        reachable: which other workers this one is known to reach, by URL.
    """

    def __init__(
        self,
        url: str,
        open_wire: Callable[[], Awaitable[Wire]],
        loop: asyncio.AbstractEventLoop,
        *,
        token: str | None = None,
        blocking: bool = False,
        reconnect: float = 5.0,
    ) -> None:
        self.url, self._is_blocking = url, blocking
        self.worker: Any = None
        self.info: dict[str, Any] = {}
        self.device = torch.device("cpu")
        self.wake = asyncio.Event()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.session = Session(Role.CLIENT, allocate)
        self.failures = Failures(self.session.sender.note)
        self._put = self.session.sender.put
        self.reachable: dict[str, bool] = {}
        self.recordings: list[Recording] = []
        self.plans: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self.received_bytes = self.sent_bytes = 0
        self._open_wire, self.loop, self._token = open_wire, loop, token
        self._reconnect = reconnect
        #: Between the beginning and the end of a connection.
        self._is_connected = False
        #: Whether the connection, or the last one, got as far as a welcome.
        self._was_live = False
        self._thread = threading.get_ident()
        self._poked = False
        #: Somebody waits for what is queued.
        self._is_urgent = False
        self._left_at = 0.0
        self._held_until: float | None = None
        self._ids = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._released: deque[int] = deque()
        self._released_bytes = 0
        self._most_released = _DELETED_BYTES
        self._names: dict[str, int] = {}
        self._dead: WsfedError | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._main: asyncio.Task[None] | None = None

    # --- life ---

    def start(self) -> None:
        """Begin to connect; in the event loop's thread."""
        self._thread = threading.get_ident()
        self._main = self.loop.create_task(self._run(), name=f"wsfed {self.url}")

    async def close(self) -> None:
        """End the session. Nothing is raised; what failed unseen is logged."""
        unseen = list(self.failures.unseen())
        if unseen:
            more = f"\n(and {len(unseen) - 1} more failures)" if len(unseen) > 1 else ""
            _log.warning("never awaited: %s%s", unseen[0], more)
        if self.session.state is not State.GONE:
            self.session.end("the client is done")
        self._die(self._lost("it was closed by this program"))
        self.wake.set()
        others = self._tasks - {asyncio.current_task()}
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        for task in others:
            task.cancel()
        if self._main is not None:
            if not self._is_connected:
                self._main.cancel()
            await asyncio.gather(self._main, *others, return_exceptions=True)

    @property
    def closed(self) -> bool:
        """The session is over."""
        return self._dead is not None

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; a session without one tries to get it back."""
        return self._is_connected

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        except Exception as error:  # whatever it is, nobody may wait for ever
            _log.exception("the connection to %s ended unexpectedly", self.url)
            self._die(self._lost(f"{type(error).__name__}: {error}"))

    def _lost(self, reason: str, code: str = "") -> ConnectionLost:
        known = self.worker.id if self.info else ""
        if code:
            return NodeUnavailable(self.url, reason, self.worker.id, code, known)
        return ConnectionLost(self.url, reason, known)

    async def _keep_connected(self) -> None:
        attempt = 0
        give_up: float | None = None
        while True:
            self._was_live, code = False, ""
            try:
                wire = await self._open_wire()
            except WireLost as lost:
                reason, code = lost.reason, lost.code
            except WsfedError as error:  # there is no use in trying again
                self._die(error)
            else:
                reason = await self._use(wire)
            if self._dead is not None:
                return
            now = self.loop.time()
            if give_up is None or self._was_live:
                attempt, give_up = 0, now + self._reconnect
            if self.session.state is State.IDLE or now >= give_up:
                self._die(self._lost(reason, code))
                return
            longest = min(_BACK_OFF[1], _BACK_OFF[0] * 2 ** min(attempt, 16), give_up - now)
            await asyncio.sleep(random.uniform(0, longest))
            attempt += 1

    async def _use(self, wire: Wire) -> str:
        self.session.hello(
            self.loop.time(), token=self._token, ticket=None, client=f"torch {torch.__version__}"
        )
        self._is_connected = True
        try:
            reason = await pump(wire, self)
        finally:
            self._is_connected = False
        self.session.cut(self.loop.time())
        return reason

    def _die(self, error: WsfedError) -> None:
        """The session is over: whoever waits is told."""
        if self._dead is None:
            self._dead = error
        for request in self._requests.values():
            if not request.future.done():
                request.future.set_exception(self._dead)
                request.future.exception()  # whoever awaits it is told; nobody has to
        self._requests.clear()
        if not self.opened.done():
            self.opened.set_exception(self._dead)
            self.opened.exception()

    def _alive(self) -> None:
        if self._dead is not None:
            raise self._dead.with_traceback(None)

    # --- commands (any thread) ---

    def new_id(self) -> int:
        """An identifier that this session has not used."""
        return next(self._ids)

    def issue(self, command: list[Any], site: Site | None = None) -> None:
        """Queue a command.

        Args:
            command: in wire form.
            site: the user's line, for errors.

        Raises:
            WsfedError: the session is over, or the command has no wire form.
        """
        if self._dead is not None:
            self._alive()
        if (recording := recording_now()) is not None:
            recording.issue(self, command, site)
            return
        if self._released_bytes >= self._most_released or len(self._released) >= _DELETES:
            self._delete_released()
        name = command[1] if command[0] == _EXECUTE else None
        number = self._names.get(name) if name is not None else None
        if number is not None:
            command[1] = number
        self._put(command, site)
        if name is not None and number is None:
            self._names[name] = len(self._names)
        if not self._poked:
            self._poke()

    def store(
        self,
        id: int,
        tensor: torch.Tensor,
        requires_grad: bool,
        site: Site | None = None,
        *,
        lasting: bool = False,
        sealed: bool = False,
    ) -> None:
        """Queue a tensor, as it is now; one that lasts is not copied."""
        self._alive()
        if (recording := recording_now()) is not None:
            recording.store(self, id, tensor, requires_grad, site)
            return
        self._put_with(
            m.Store(id, 0, requires_grad, sealed), outgoing(tensor, lasting=lasting), site
        )

    def define(self, plan: int, packed: bytes, site: Site | None = None) -> None:
        """Queue a recorded program."""
        self._alive()
        program = Outgoing("uint8", (len(packed),), memoryview(packed))
        self._put_with(m.Define(plan, 0), program, site)

    def _put_with(self, message: m.Message, tensor: Outgoing, site: Site | None) -> None:
        self.session.sender.put_tensor(lambda place: message.wire(tensor=place), tensor, site)
        if not self._poked:
            self._poke()

    def stop(self, request: int) -> None:
        """End a run over a data set with the batch that it is at."""
        self.loop.call_soon_threadsafe(self._stop, request)

    def _stop(self, request: int) -> None:
        if request in self._requests:
            self.session.stop(request)
            self.wake.set()

    def cancel(self) -> None:
        """Give up every command that was sent and has not started."""
        self._alive()
        self.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self.session.cancel()
        self.wake.set()

    def release(self, id: int, nbytes: int = 0) -> None:
        """Nobody holds this object, of about this size, any more. Never raises."""
        if self.recordings:
            self._recording_of(id).release(id, nbytes)
            return
        self._released.append(id)
        self._released_bytes += nbytes

    def _recording_of(self, id: int) -> Recording:
        """The recording that made this object, else the last one."""
        for recording in self.recordings:
            if recording.made(id):
                return recording
        return self.recordings[-1]

    def fetch(
        self,
        id: int,
        site: Site | None = None,
        meta: Meta | None = None,
        *,
        gate: Gate | None = None,
    ) -> asyncio.Future[torch.Tensor]:
        """Ask for a value; the request leaves at once, or when ``gate`` opens."""
        return self.ask(lambda request: m.Get(request, id).wire(), site, meta, gate=gate)

    def ask(
        self,
        make: Callable[[int], list[Any]],
        site: Site | None = None,
        meta: Meta | None = None,
        *,
        gate: Gate | None = None,
        progress: Callable[[m.Progress], None] | None = None,
        tensor: torch.Tensor | None = None,
    ) -> asyncio.Future[Any]:
        """Queue a request.

        Args:
            make: gives the command for the number of the request.
            site: the user's line, for errors.
            meta: what the tensor that answers has to be like, where that is known.
            gate: where to queue it, if not at the end.
            progress: told how far it is, where the worker tells so.
            tensor: goes along; the command says ``0`` for its place.
        """
        self._alive()
        if (recording := recording_now()) is not None:
            recording.refuse(NO_VALUES)
        request = self.new_id()
        future: asyncio.Future[Any] = self.loop.create_future()
        command = make(request)
        self._requests[request] = _Request(future, site, command[0], meta, progress)
        if tensor is not None:
            self._put_with(m.parse(command, (m.COMMANDS,)), outgoing(tensor), site)
        elif gate is None:
            self.issue(command, site)
        else:
            gate.put(command)
        self._is_urgent = True
        self._poke()
        return future

    def transfer(self, ids: Sequence[int], to: Link, new_ids: Sequence[int]) -> None:
        """Copy objects to another worker; later commands there wait for them."""
        assert isinstance(to, Connection)
        if (recording := recording_now()) is not None:
            recording.refuse("moving to another worker has no place in it; move before or after")
        self._alive()
        to._alive()
        self.spawn(transfer(self, ids, to, new_ids))

    @property
    def blocking(self) -> bool:
        """Whether what brings something back returns it, instead of an awaitable.

        What awaits in the loop's thread (:data:`awaited`) is given awaitables by all.
        """
        if not self._is_blocking:
            return False
        return not (awaited.get() and threading.get_ident() == self._thread)

    def settle(self, asked: Awaitable[Any]) -> Any:
        """An awaitable as it is, or in the blocking world its result."""
        return self.run(_result(asked)) if self.blocking else asked

    @property
    def link(self) -> Connection:
        """This is the session; a worker's handle has the same name for it."""
        return self

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Start ``work``: an awaitable, or in the blocking world its result."""
        if not self.blocking:
            return self.spawn(work)
        if threading.get_ident() == self._thread:
            work.close()
            raise LocalProtocolError("deadlock", "a blocking call inside the event loop's thread")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Start ``work`` as a task that ends with the connection at the latest."""
        if threading.get_ident() != self._thread:
            return asyncio.run_coroutine_threadsafe(work, self.loop)
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _delete_released(self) -> None:
        self._released_bytes = 0
        ids = []
        with contextlib.suppress(IndexError):  # another thread may take some
            while self._released:
                ids.append(self._released.popleft())
        for start in range(0, len(ids), limits.MAX_IDS):
            self.session.sender.put(m.Delete(ids[start : start + limits.MAX_IDS]).wire())

    def _poke(self) -> None:
        """Wake the pump, once until it looks for a frame."""
        self._poked = True
        if threading.get_ident() == self._thread:
            self.wake.set()
        else:
            self.loop.call_soon_threadsafe(self.wake.set)

    # --- the pump's view ---

    @property
    def over(self) -> bool:
        """See :class:`~wsfed.transport.pump.End`."""
        return self._dead is not None

    def leave(self) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        if self.session.state is not State.GONE:
            self.session.end("the client's program has ended")
        self._die(self._lost("the program's event loop was ended"))

    @property
    def next_tick(self) -> float | None:
        """See :class:`~wsfed.transport.pump.End`."""
        due = self.session.next_tick
        if self._held_until is None or due is None:
            return due
        return min(due, self._held_until)

    def next_frame(self, now: float) -> Sequence[Buffer] | None:
        """See :class:`~wsfed.transport.pump.End`."""
        if self._may_wait(now):
            self._held_until = self._left_at + _COMPANY
            return None
        self._held_until = None
        self._poked = False  # what is put from now on may come too late for this frame
        if self._released and self.session.state is State.LIVE:
            self._delete_released()
        frame = self.session.next_frame(now)
        if frame is not None:
            self.sent_bytes += sum(map(len, frame))
            self._left_at = now
        else:
            self._is_urgent = False
        return frame

    def _may_wait(self, now: float) -> bool:
        """Whether what is queued waits for company."""
        return (
            now - self._left_at < _COMPANY
            and not self._is_urgent
            and self._dead is None
            and self.session.state is State.LIVE
            and not self.session.has_control
            and 0 < self.session.sender.waiting < _COMPANY_BYTES
        )

    def tick(self, now: float) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        for event in self.session.tick(now):
            if isinstance(event, Silent):
                raise WireLost(f"nothing came for {event.seconds:.0f} s")

    def broken(self, error: Exception, now: float) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        if isinstance(error, RemoteProtocolError):
            self.session.refuse(error.code, error.reason)
            self._die(error)
        else:
            _log.error("a connection broke", exc_info=error)
            self.session.end()
            self._die(self._lost(f"{type(error).__name__}: {error}"))

    def arrived(self, data: Buffer, now: float) -> None:
        """See :class:`~wsfed.transport.pump.End`."""
        self.received_bytes += len(data)
        try:
            for event in self.session.receive(data, now):
                self._handle(event, now)
        except RemoteProtocolError as error:
            self.broken(error, now)
        self.wake.set()

    def _handle(self, event: Event, now: float) -> None:
        match event:
            case Delivery():
                for raw in event.messages:
                    self._replied(m.parse(raw, (m.REPLIES,)), event)
                self.session.processed(event.seq)
                if not self._requests:
                    self.session.request_ack(now)
            case Opened(worker, info, resumed):
                self._was_live = True
                if not resumed:
                    self._welcomed(worker, info)
            case Lost(reason):
                self._die(SessionLost(self.worker.id, reason))
            case Ended(reason):
                self._die(SessionLost(self.worker.id, reason))
            case RefusedByPeer("authentication", reason):
                self._die(AuthenticationFailed(self.url, reason))
            case RefusedByPeer(error, reason):
                self._die(RemoteProtocolError(error, reason))

    def _welcomed(self, worker: str, info: Mapping[str, Any]) -> None:
        self.info = {**info, "id": worker}
        if type(most := info.get("max_memory")) is int:
            self._most_released = min(_DELETED_BYTES, most // 16)
        try:
            self.device = torch.device(str(info.get("device", "cpu")))
        except RuntimeError as error:
            said = str(error).splitlines()[0][:200]
            raise RemoteProtocolError("malformed", f"the worker's device is none: {said}") from None
        if not self.opened.done():
            self.opened.set_result(None)

    # --- replies ---

    def _replied(self, reply: m.Message, delivery: Delivery) -> None:
        match reply:
            case m.TensorReply(request, place, requires_grad):
                if place >= len(delivery.tensors):
                    raise RemoteProtocolError("malformed", "a reply without its tensor")
                self._resolve_tensor(request, delivery.tensors[place], requires_grad)
            case m.ValueReply(request, value):
                if request in self._requests:
                    check_value(self._requests[request].command, value)
                self._resolve(request, value)
            case m.Progress(request):
                if (asked := self._requests.get(request)) is not None:
                    if asked.progress is None:
                        raise RemoteProtocolError("unfit-answer", "nothing tells of its progress")
                    asked.progress(reply)
            case m.Failed(seq, index, bound, failure):
                self.failures.add((seq, index), failure, bound=bound, worker=self.worker.id)
            case m.RequestFailed(request, seq, index, failure):
                site = self._requests[request].site if request in self._requests else None
                error = self.failures.take((seq, index), failure, site, worker=self.worker.id)
                self._resolve(request, None, error)

    def _resolve_tensor(self, request: int, received: Incoming, requires_grad: bool) -> None:
        asked = self._requests.get(request)
        if asked is None:
            return
        check_tensor(asked.command, received, asked.meta, requires_grad=requires_grad)
        tensor = incoming(received)
        if tensor is None:
            self._resolve(request, None, MemoryError("no memory for the tensor"))
        else:
            self._resolve(request, tensor.requires_grad_(requires_grad))

    def _resolve(self, request: int, value: Any, error: Exception | None = None) -> None:
        asked = self._requests.pop(request, None)
        if asked is None or asked.future.done():
            return
        # What belongs to no object is told at the next await, whatever that is for; it came first.
        error = self.failures.next_unbound() or error
        if error is not None:
            asked.future.set_exception(error)
        else:
            asked.future.set_result(value)


async def _result(asked: Awaitable[Any]) -> Any:
    return await asked
