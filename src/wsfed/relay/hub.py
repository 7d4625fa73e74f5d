"""A hub: takes connections of nodes and clients, and joins those that belong together.

What a connection is for is its first message: a node enrols (and keeps the connection), or answers
with a ticket; a client calls a node, or watches who is there. Behind a call that was answered the
hub reads nothing: sessions, their tokens and their resuming are between client and node.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import ssl as ssl_module
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.relay.pages import Pages
from wsfed.relay.registry import Member, Refusal, Registry
from wsfed.relay.splice import first, splice
from wsfed.transport.line import Line
from wsfed.transport.websocket import listen
from wsfed.transport.wire import Wire, WireLost

__all__ = ["Hub"]

_log = logging.getLogger("wsfed.relay")

#: Nobody guesses a ticket of so many bytes.
_TICKET_BYTES: Final = 32


@dataclass(slots=True, eq=False)
class _Call:
    """A client waits for a node to dial back, or is connected with it."""

    member: Member
    answered: asyncio.Future[Line]
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Hub:
    """Connects clients with nodes that have dialled.

    Args:
        token: what clients have to show; ``None`` lets everybody in.
        node_token: what nodes have to show; by default the same.
        origins: pages whose scripts may connect, such as ``"https://example.org"``.
        most_nodes: how many may be enrolled.
    """

    def __init__(
        self,
        *,
        token: str | None = None,
        node_token: str | None = None,
        origins: Sequence[str] = (),
        most_nodes: int = limits.MAX_NODES,
    ) -> None:
        self._token, self._node_token = token, token if node_token is None else node_token
        self._origins = tuple(origins)
        self.registry = Registry(most_nodes)
        self._calls: dict[bytes, _Call] = {}
        self._pages = Pages(self.registry, token)

    @asynccontextmanager
    async def listen(
        self, host: str = "127.0.0.1", port: int = 0, ssl: ssl_module.SSLContext | None = None
    ) -> AsyncIterator[str]:
        """Accept connections while the context lasts; gives the URL.

        Raises:
            OSError: the address cannot be bound.
        """
        async with listen(
            self.serve,
            host=host,
            port=port,
            ssl=ssl,
            pages=self._pages.answer,
            origins=self._origins,
            what="hub",
        ) as (bound_host, bound_port):
            shown = f"[{bound_host}]" if ":" in bound_host else bound_host
            try:
                yield f"{'wss' if ssl else 'ws'}://{shown}:{bound_port}"
            finally:
                for call in self._calls.values():
                    if not call.answered.done():
                        call.answered.set_exception(Refusal("busy", "the hub is shutting down"))

    async def serve(self, wire: Wire) -> None:
        """Serve one connection until it ends."""
        line = Line(wire, asks=False)
        try:
            await self._serve(line)
        except (Refusal, RemoteProtocolError) as refused:
            _log.info("a connection is refused: %s", refused)
            await line.refuse(refused.code, refused.reason)
        except WireLost:
            pass
        finally:
            await wire.close()

    async def _serve(self, line: Line) -> None:
        greeting = await line.greeted(limits.HANDSHAKE_SECONDS)
        match greeting:
            case m.Enrol():
                self._check(greeting.version, greeting.token, self._node_token)
                await self._enrol(line, greeting)
            case m.Answer():
                await self._answer(line, greeting)
            case m.Call():
                self._check(greeting.version, greeting.token, self._token)
                await self._call(line, greeting.node)
            case m.Watch():
                self._check(greeting.version, greeting.token, self._token)
                await self._watch(line)
            case m.Hello() | m.Resume():
                raise Refusal("unexpected", "this is a hub: connect with wsfed.hub(url)")
            case _:
                raise Refusal("unexpected", f"{type(greeting).__name__} begins nothing here")

    def _check(self, version: int, shown: str | None, token: str | None) -> None:
        if version != m.VERSION:
            raise Refusal(
                "version",
                f"this hub speaks version {m.VERSION} of the protocol, not {version}; install "
                "the same release of wsfed on both sides",
            )
        if token is not None and not hmac.compare_digest((shown or "").encode(), token.encode()):
            said = "the token is wrong" if shown else "a token is needed"
            raise Refusal("authentication", said)

    # --- nodes ---

    async def _enrol(self, line: Line, announced: m.Enrol) -> None:
        member = Member(announced, line, int(time.time()))
        before = await self._make_room(announced)
        self.registry.add(member)
        _log.info("node %s is there", announced.node)
        reason = "the hub is shutting down"
        try:
            await line.say(m.Enrolled())
            if before is not None:
                await before.line.wire.close("the node has connected anew")
            said = await line.hear()
            raise RemoteProtocolError(
                "unexpected", f"{type(said).__name__} is not expected of a node"
            )
        except WireLost as lost:
            reason = lost.reason
        except RemoteProtocolError as error:
            reason = error.reason
            raise
        finally:
            self.registry.remove(member, reason)
            _log.info("node %s is gone: %s", announced.node, reason)

    async def _make_room(self, announced: m.Enrol) -> Member | None:
        """The member whose place a node takes; ``None`` where the name is free.

        Raises:
            Refusal: another node has the name, and is there.
        """
        while (there := self.registry.members.get(announced.node)) is not None:
            if announced.key and hmac.compare_digest(announced.key, there.announced.key):
                return there
            if await _lives(there):
                raise Refusal("taken", f"there is another node {announced.node!r} already")
            self.registry.remove(there, "it did not answer, and another node took its name")
            await there.line.wire.close("silent")
        return None

    async def _answer(self, line: Line, shown: m.Answer) -> None:
        call = self._calls.pop(shown.ticket, None)
        if call is None or call.answered.done():
            raise Refusal("ticket", "nobody waits for this ticket: it is used, late or made up")
        call.answered.set_result(line)
        await call.over.wait()

    # --- clients ---

    async def _call(self, line: Line, name: str) -> None:
        member = self.registry.find(name)
        if len(self._calls) >= limits.MAX_CALLS:
            raise Refusal("busy", "too many clients wait for their nodes")
        if member.waiting >= limits.MAX_CALLS_OF_NODE:
            raise Refusal("busy", f"too many clients wait for node {name!r}")
        call = _Call(member, asyncio.get_running_loop().create_future())
        try:
            far = await self._ring(call)
            await line.say(m.Through())
            await far.say(m.Through())
            ended = await splice(line.wire, far.wire, member.traffic, self.registry.total)
            _log.info("a session with node %s ends: %s", name, ended)
        finally:
            call.over.set()

    async def _ring(self, call: _Call) -> Line:
        name = call.member.name
        ticket = secrets.token_bytes(_TICKET_BYTES)
        self._calls[ticket] = call
        call.member.waiting += 1
        try:
            async with asyncio.timeout(limits.DIAL_BACK_SECONDS):
                await call.member.line.say(m.Ring(ticket))
                return await call.answered
        except WireLost as lost:
            raise Refusal("left", f"node {name!r} is gone: {lost.reason}") from None
        except TimeoutError:
            raise Refusal(
                "no-answer",
                f"node {name!r} did not dial back within {limits.DIAL_BACK_SECONDS:g} s",
            ) from None
        finally:
            call.member.waiting -= 1
            self._calls.pop(ticket, None)

    async def _watch(self, line: Line) -> None:
        watcher = self.registry.watch()

        async def tell() -> str:
            while True:
                await line.say(await watcher.next())

        async def hear() -> str:
            said = await line.hear()
            raise RemoteProtocolError("unexpected", f"{type(said).__name__} is not expected here")

        try:
            await first(tell(), hear())
        finally:
            self.registry.unwatch(watcher)


async def _lives(member: Member) -> bool:
    """Whether a node answers."""
    member.line.heard.clear()
    try:
        async with asyncio.timeout(limits.PROBE_SECONDS):
            await member.line.say(m.Ping())
            await member.line.heard.wait()
    except (TimeoutError, WireLost):
        return False
    return True
