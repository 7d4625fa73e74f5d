"""A node that cannot listen: it dials a hub, stays there, and dials once more for each session."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl as ssl_module
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from wsfed.errors import AuthenticationFailed, EnrolmentRefused, RemoteProtocolError, WsfedError
from wsfed.protocol import messages as m
from wsfed.transport.line import Line, answer, open_line
from wsfed.transport.wire import Wire, WireLost

__all__ = ["Enrolment"]

_log = logging.getLogger("wsfed.node")

#: The first wait before the hub is dialled again, and the longest, in seconds (full jitter): a hub
#: that comes back is found before its clients give up, and is not run over by all nodes at once.
_BACK_OFF: Final = (0.1, 10.0)
#: Clients that this node dials back at once; what a hub asks for beyond that has to wait.
_MOST_DIALS: Final = 64
#: A hub says these of a node that will not be taken the next time either.
_FINAL: Final = frozenset({"taken", "malformed", "message-size", "version"})


class Enrolment:
    """Keeps a node enrolled with a hub.

    Args:
        url: ``ws://host:port`` or ``wss://host:port`` of the hub.
        serve: serves a session's connection until it ends.
        node: the name.
        profile: what it runs.
        tags: what clients look for.
        capabilities: what it can do.
        token: shown to the hub.
        ssl: certificates to trust, for ``wss``.

    Attributes:
        enrolled: set while the hub knows the node.
        failed: set when the hub has refused the node for good; :attr:`error` tells why.
        error: see above.
    """

    def __init__(
        self,
        url: str,
        serve: Callable[[Wire], Awaitable[None]],
        *,
        node: str,
        profile: str = "torch",
        tags: Sequence[str] = (),
        capabilities: Sequence[str] = (),
        token: str | None = None,
        ssl: ssl_module.SSLContext | None = None,
    ) -> None:
        self.url, self.enrolled, self.failed = url, asyncio.Event(), asyncio.Event()
        self.error: WsfedError | None = None
        self._serve, self._ssl = serve, ssl
        self._announced = m.Enrol(
            *(m.VERSION, token, node, secrets.token_bytes(16)),
            *(profile, list(tags), list(capabilities)),
        )
        try:
            m.parse(self._announced.wire(), (m.HUB,))
        except RemoteProtocolError as error:
            raise ValueError(error.reason) from None
        self._dials = asyncio.Semaphore(_MOST_DIALS)

    async def run(self) -> None:
        """Until it is cancelled, or the hub refuses the node for good."""
        try:
            await self._keep_enrolled()
        except Exception as error:  # whatever it is, whoever waits is told
            _log.exception("node %s: the connection to its hub ended unexpectedly", self._name)
            self._fail(EnrolmentRefused(self.url, "broken", f"{type(error).__name__}: {error}"))

    async def _keep_enrolled(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as sessions:
            attempt = 0
            while self.error is None:
                begun = loop.time()
                try:
                    await self._stay(sessions)
                except WireLost as lost:
                    level = logging.INFO if attempt else logging.WARNING
                    _log.log(level, "the hub at %s: %s; it is tried again", self.url, lost.reason)
                except (AuthenticationFailed, EnrolmentRefused, RemoteProtocolError) as error:
                    self._fail(error)
                    return
                self.enrolled.clear()
                if loop.time() - begun > _BACK_OFF[1]:  # it was there, and not only for a moment
                    attempt = 0
                longest = min(_BACK_OFF[1], _BACK_OFF[0] * 2 ** min(attempt, 16))
                await asyncio.sleep(random.uniform(0, longest))
                attempt += 1

    @property
    def _name(self) -> str:
        return self._announced.node

    def _fail(self, error: WsfedError) -> None:
        self.error = error
        self.enrolled.clear()
        self.failed.set()

    async def _stay(self, sessions: asyncio.TaskGroup) -> None:
        """Enrol, and dial for whoever calls, until the connection is lost."""
        try:
            line, _ = await open_line(self.url, self._announced, (m.Enrolled,), ssl=self._ssl)
        except WireLost as lost:
            if lost.code in _FINAL:
                raise EnrolmentRefused(self.url, lost.code, lost.reason) from None
            raise
        self.enrolled.set()
        try:
            await self._listen(line, sessions)
        finally:
            await line.wire.close("the node has left")

    async def _listen(self, line: Line, sessions: asyncio.TaskGroup) -> None:
        while True:
            said = await line.hear()
            match said:
                case m.Ring(ticket):
                    await self._dials.acquire()
                    sessions.create_task(self._session(ticket))
                case m.Refused(error, reason):
                    raise WireLost(reason, error)
                case _:
                    raise RemoteProtocolError(
                        "unexpected", f"{type(said).__name__} is not expected of a hub"
                    )

    async def _session(self, ticket: bytes) -> None:
        try:
            wire = await answer(self.url, ticket, ssl=self._ssl)
        except (WireLost, WsfedError) as lost:
            _log.info("node %s: no connection for a client: %s", self._name, lost)
            return
        finally:
            self._dials.release()
        try:
            await self._serve(wire)
        except Exception:  # one session's end is no other's
            _log.exception("node %s: a connection broke", self._name)
