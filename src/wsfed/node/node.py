"""A worker node: sessions, their threads, and the connections that come and go.

One process, any number of clients. Each session has objects, random numbers and a thread of its
own; nothing of one is visible in another. The node keeps a session whose connection was cut until
its time to live is over.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import platform
import secrets
import ssl as ssl_module
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from wsfed.errors import RemoteProtocolError
from wsfed.node.enrolment import Enrolment
from wsfed.node.hosted import Attached, Hosted
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import encode, pack
from wsfed.protocol.session import read_greeting
from wsfed.transport.carrier import carry
from wsfed.transport.websocket import check_exposure, check_url, dial, listen
from wsfed.transport.wire import Wire, WireLost
from wsfed.worker.datasets import Dataset
from wsfed.worker.executor import Executor
from wsfed.worker.interpreter import Carry, Interpreter
from wsfed.worker.memory import give_back_memory
from wsfed.worker.plans import Programs
from wsfed.worker.session import Carried
from wsfed.worker.strict import Vault

if TYPE_CHECKING:
    from wsfed.privacy.roster import Membership
    from wsfed.worker.secagg import SecureRounds
    from wsfed.worker.strict import Ledger

__all__ = ["Node", "check_exposure", "default_max_memory"]

_log = logging.getLogger("wsfed.node")

#: Sessions at once: each may have a thread.
_MOST_SESSIONS: Final = 1000
#: Tickets that clients have announced and no carrier has shown yet, and the other way round.
_MOST_TICKETS: Final = 256
#: A carrier may be faster than the client's announcement; it waits this long for it.
_TICKET_SECONDS: Final = 5.0
#: Two workers that can reach each other do so within this time.
_DIAL_SECONDS: Final = 3.0
_MAX_OBJECTS: Final = 4_000_000


def default_max_memory() -> int:
    """What a session may take where the owner says nothing: half of the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


class Node:
    """A worker. Use it as an async context manager.

    Args:
        id: the worker's name.
        datasets: what the owner offers.
        device: where tensors are kept and computed, such as ``"cpu"`` or ``"cuda:0"``.
        max_memory: bytes that the tensors of one session may take.
        token: what a client has to show; ``None`` lets everybody in.
        direct: whether this worker takes tensors to other workers itself when a client asks.
        membership: in rounds of secure aggregation (:mod:`wsfed.privacy.roster`).
        ledger: makes the worker strict: nothing leaves but releases by its rules.
    """

    def __init__(
        self,
        id: str,
        *,
        datasets: Iterable[Dataset] = (),
        device: str | torch.device = "cpu",
        max_memory: int | None = None,
        token: str | None = None,
        direct: bool = True,
        membership: Membership | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._membership, self._ledger = membership, ledger
        self.id = id
        self.device = torch.device(device)
        self.datasets: Mapping[str, Dataset] = MappingProxyType({d.name: d for d in datasets})
        self._max_memory = max_memory if max_memory is not None else default_max_memory()
        self._token, self._direct = token, direct
        self._epoch = secrets.token_bytes(16)
        self._sessions: dict[bytes, Hosted] = {}
        self._programs = Programs()
        self._tickets: dict[bytes, asyncio.Future[tuple[Hosted, Sequence[int]]]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._closing = False
        self._ending: list[Executor] = []

    async def __aenter__(self) -> Node:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._tasks is not None
        await self._say_goodbye()
        tasks, self._tasks = self._tasks, None
        await tasks.__aexit__(None, None, None)

    async def _say_goodbye(self) -> None:
        """Take no more sessions, and end the ones there are."""
        self._closing = True
        hosted = list(self._sessions.values())
        for each in hosted:
            each.say_goodbye("the worker is shutting down")
        await asyncio.gather(*(each.left() for each in hosted))
        for each in hosted:
            self.forget(each)
        await self.join()

    async def join(self, seconds: float = 5.0) -> bool:
        """Wait until no thread of an ended session is at work; whether that is so."""
        ended = [asyncio.to_thread(each.join, seconds) for each in self._ending]
        return all(await asyncio.gather(*ended))

    @property
    def info(self) -> dict[str, Any]:
        """What the worker tells about itself in its welcome."""
        return {
            "id": self.id,
            "profile": "torch",
            "device": str(self.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "max_memory": self._max_memory,
            "direct": self._direct,
            "datasets": {
                name: {"rows": d.rows, "open": d.open} for name, d in self.datasets.items()
            },
            "sessions": len(self._sessions),
            "releases": None
            if self._ledger is None
            else {"clip": self._ledger.rules.clip, "noise": self._ledger.rules.noise},
            "secagg": None if self._membership is None else self._membership.name,
        }

    def objects(self) -> list[dict[int, torch.Tensor]]:
        """The tensors of each session, by identifier: what the owner's own program can see."""
        return [each.interpreter.store.tensors() for each in self._sessions.values()]

    # --- listening ---

    @asynccontextmanager
    async def listen(
        self, host: str = "127.0.0.1", port: int = 0, ssl: ssl_module.SSLContext | None = None
    ) -> AsyncIterator[str]:
        """Accept connections while the context lasts; gives the URL.

        Raises:
            OSError: the address cannot be bound.
        """
        async with listen(
            self.serve, host=host, port=port, ssl=ssl, health=lambda: f"ok {self.id}"
        ) as (bound_host, bound_port):
            shown = f"[{bound_host}]" if ":" in bound_host else bound_host
            try:
                yield f"{'wss' if ssl else 'ws'}://{shown}:{bound_port}"
            finally:
                await self._say_goodbye()

    @asynccontextmanager
    async def enrol(
        self,
        url: str,
        *,
        tags: Iterable[str] = (),
        token: str | None = None,
        ssl: ssl_module.SSLContext | None = None,
    ) -> AsyncIterator[Enrolment]:
        """Be reached through a hub while the context lasts, instead of listening.

        The hub is dialled again and again until it is there, and whenever it is lost.

        Args:
            url: ``ws://host:port`` or ``wss://host:port`` of the hub.
            tags: what clients look for.
            token: shown to the hub.
            ssl: certificates to trust, for ``wss``.

        Raises:
            ValueError: the URL, the node's name or a tag is none.
        """
        check_url(url, ssl)
        enrolment = Enrolment(
            url,
            self.serve,
            node=self.id,
            tags=list(tags),
            capabilities=[f"torch/{torch.__version__}", f"device/{self.device}"],
            token=token,
            ssl=ssl,
        )
        task = asyncio.create_task(enrolment.run(), name=f"wsfed {self.id} at {url}")
        try:
            yield enrolment
        finally:
            await self._say_goodbye()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def serve(self, wire: Wire) -> None:
        """Serve one connection until it ends."""
        try:
            attached = await self._greet(wire)
        except (WireLost, TimeoutError):
            await wire.close()
            return
        except RemoteProtocolError as error:
            await _answer(wire, m.Refused(error.code, error.reason[: limits.MAX_TEXT]))
            return
        if attached is not None:
            await attached.run(wire)

    async def _greet(self, wire: Wire) -> Attached | None:
        async with asyncio.timeout(limits.HANDSHAKE_SECONDS):
            greeting = read_greeting(await wire.receive())
        if isinstance(greeting, m.Resume):
            return await self._resume(greeting, wire)
        if greeting.ticket is not None:
            return await self._admit_carrier(greeting.ticket)
        if self._token is not None and not hmac.compare_digest(
            (greeting.token or "").encode(), self._token.encode()
        ):
            said = "the token is wrong" if greeting.token else "a token is needed"
            raise RemoteProtocolError("authentication", said)
        if len(self._sessions) >= _MOST_SESSIONS or self._closing:
            raise RemoteProtocolError("busy", "the worker takes no more sessions now")
        return self._admit()

    def _admit(self) -> Attached:
        interpreter = Interpreter(
            self.device,
            self.datasets,
            max_bytes=self._max_memory,
            max_objects=_MAX_OBJECTS,
            programs=self._programs,
            secure=self._secure_rounds(),
            vault=Vault(self._ledger),
        )
        # Asking for their number is what makes a new thread use torch's number of threads; its
        # first sums would come in another order otherwise.
        executor = Executor(f"wsfed {self.id}", torch.get_num_threads)
        hosted = Hosted(self, interpreter, executor)
        hosted.protocol.welcome(_now(), epoch=self._epoch, worker=self.id, info=self.info)
        self._sessions[hosted.protocol.id] = hosted
        return hosted.attach()

    def _secure_rounds(self) -> SecureRounds | None:
        if self._membership is None:
            return None
        from wsfed.worker.secagg import SecureRounds  # needs cryptography, which is optional

        return SecureRounds(self._membership)

    async def _resume(self, asked: m.Resume, wire: Wire) -> Attached | None:
        hosted = self._sessions.get(asked.session)
        if asked.epoch != self._epoch or hosted is None:
            restarted = asked.epoch != self._epoch
            said = "the worker was restarted" if restarted else "its time to live was over"
            await _answer(wire, m.SessionLost(said))
            return None
        if not hosted.protocol.knows(asked.token):
            raise RemoteProtocolError("token", "the token does not belong to the session")
        await hosted.fence()
        hosted.protocol.resume(asked, _now())
        return hosted.attach()

    # --- tensors from other workers ---

    async def _admit_carrier(self, ticket: bytes) -> Attached:
        try:
            async with asyncio.timeout(_TICKET_SECONDS):
                target, ids = await self._ticket(ticket)
        except TimeoutError:
            raise RemoteProtocolError("ticket", "nobody has announced this ticket") from None
        finally:
            self._tickets.pop(ticket, None)
        if target.protocol.id not in self._sessions:
            raise RemoteProtocolError("ticket", "the session that expected this is over")
        hosted = Hosted(self, target.interpreter, target.executor, only=frozenset(ids))
        hosted.protocol.welcome(_now(), epoch=self._epoch, worker=self.id, info={})
        target.guests.add(hosted)
        return hosted.attach()

    def _ticket(self, ticket: bytes) -> asyncio.Future[tuple[Hosted, Sequence[int]]]:
        if ticket not in self._tickets:
            if len(self._tickets) >= _MOST_TICKETS:
                raise RemoteProtocolError("busy", "too many transfers at once")
            self._tickets[ticket] = asyncio.get_running_loop().create_future()
        return self._tickets[ticket]

    def expect(self, hosted: Hosted, ticket: bytes, ids: Sequence[int]) -> None:
        """A client announces that another worker will bring these objects."""
        try:
            future = self._ticket(ticket)
        except RemoteProtocolError:
            return  # the carrier is refused, and the client takes the detour
        if not future.done():
            future.set_result((hosted, ids))

    def carry(self, hosted: Hosted, job: Carry) -> None:
        """Take tensors to another worker, and report to the session."""
        if self._tasks is not None:
            self._tasks.create_task(self._carry(hosted, job))

    async def _carry(self, hosted: Hosted, job: Carry) -> None:
        error: Exception | None = None
        try:
            if not self._direct:
                raise WireLost("this worker connects to no others")
            wire = await dial(job.url, timeout=_DIAL_SECONDS)
            await carry(wire, job.ticket, job.names, job.tensors)
        except Exception as caught:  # whatever it was, the client is told
            error = caught
        hosted.handle(Carried(job, error))

    # --- the end of sessions ---

    def forget(self, hosted: Hosted) -> None:
        """A session is over."""
        if self._sessions.pop(hosted.protocol.id, None) is not None:
            for guest in tuple(hosted.guests):
                guest.say_goodbye("the session that expected this is over")
            self._tickets = {t: f for t, f in self._tickets.items() if not _is_of(f, hosted)}
            hosted.executor.submit(hosted.interpreter.store.clear)
            hosted.executor.submit(give_back_memory)
            hosted.executor.end()
            self._ending = [each for each in self._ending if not each.join(0)]
            self._ending.append(hosted.executor)


def _is_of(ticket: asyncio.Future[tuple[Hosted, Sequence[int]]], hosted: Hosted) -> bool:
    return ticket.done() and not ticket.cancelled() and ticket.result()[0] is hosted


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _answer(wire: Wire, message: m.Message) -> None:
    try:
        await wire.send(encode(0, 0, [pack(message.wire())]))
    except WireLost:
        pass
    await wire.close()
