"""The client's side of a hub: who is there, who comes and goes, and sessions with them."""

from __future__ import annotations

import asyncio
import random
import ssl as ssl_module
import weakref
from collections import deque
from collections.abc import AsyncIterator, Collection, Generator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal

from wsfed.client.connection import Connection
from wsfed.client.worker import Connecting, Worker
from wsfed.errors import (
    ConnectionLost,
    NodeUnavailable,
    RemoteProtocolError,
    TooFewNodes,
    WsfedError,
)
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.transport.line import Line, call, open_line
from wsfed.transport.websocket import check_url
from wsfed.transport.wire import WireLost

__all__ = ["HubClient", "HubEvent", "HubEvents", "HubNode", "hub"]

#: The first wait before a hub is dialled again, and the longest, in seconds (full jitter).
_BACK_OFF: Final = (0.1, 5.0)
#: Seconds until a node that did not answer is tried again by who waits for it.
_PAUSE: Final = 1.0
#: Events that nobody takes are forgotten beyond this number, oldest first.
_MOST_EVENTS: Final = 4 * limits.MAX_NODES


@dataclass(frozen=True, slots=True)
class HubNode:
    """A node as it has announced itself.

    Attributes:
        id: its name at the hub.
        profile: what it runs: ``"torch"`` or ``"portable"``.
        tags: what its owner says of it.
        capabilities: what it can do.
        since: when it came, in seconds since 1970.
    """

    id: str
    profile: str
    tags: frozenset[str]
    capabilities: tuple[str, ...]
    since: int


@dataclass(frozen=True, slots=True)
class HubEvent:
    """A node came or went.

    Attributes:
        kind: ``"joined"`` or ``"left"``.
        node: which.
        reason: why it left, else ``""``.
    """

    kind: Literal["joined", "left"]
    node: HubNode
    reason: str = ""


class HubEvents:
    """Comings and goings, to be used with ``async for``; begins with those that are there."""

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub
        self._waiting = deque(
            (HubEvent("joined", node) for node in hub.nodes()), maxlen=_MOST_EVENTS
        )

    def __aiter__(self) -> HubEvents:
        return self

    async def __anext__(self) -> HubEvent:
        while not self._waiting:
            if self._hub.closed:
                raise StopAsyncIteration
            await self._hub.changed()
        return self._waiting.popleft()

    def add(self, event: HubEvent) -> None:
        """Something happened."""
        self._waiting.append(event)


class HubClient:
    """A hub and the nodes behind it. Made by :func:`hub`; an async context manager.

    Sessions that it has opened end with it.

    Attributes:
        url: where the hub is.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        ssl: ssl_module.SSLContext | None,
        timeout: float,
        reconnect: float,
        kind: type[Worker] = Worker,
        blocking: bool = False,
    ) -> None:
        self.url, self._kind, self._is_blocking = url, kind, blocking
        self._token, self._ssl, self._timeout, self._reconnect = token, ssl, timeout, reconnect
        self._nodes: dict[str, HubNode] = {}
        self._events: weakref.WeakSet[HubEvents] = weakref.WeakSet()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed: WsfedError | None = None
        self._lost = ""
        self._workers: set[Worker] = set()
        #: Sessions that ``workers`` gives, and why there is none with a node that is there.
        self._own: dict[str, Worker] = {}
        self._absent: dict[str, str] = {}

    # --- life ---

    async def __aenter__(self) -> HubClient:
        try:
            line = await self._watch()
            try:
                await self._follow(line, until_present=True)
            except BaseException:
                await line.wire.close()
                raise
        except WireLost as lost:
            raise ConnectionLost(self.url, lost.reason) from None
        self._task = asyncio.create_task(self._keep_watching(line), name=f"wsfed hub {self.url}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every session that was opened here, and be told nothing more."""
        self._end(ConnectionLost(self.url, "it was closed by this program"))
        if self._task is not None:
            self._task.cancel()
        workers, self._workers = self._workers, set()
        await asyncio.gather(*(worker._end() for worker in workers))
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self._closed is not None

    @property
    def connected(self) -> bool:
        """Whether the hub is there; while it is not, it is looked for."""
        return not self._lost and not self.closed

    def _end(self, error: WsfedError) -> None:
        self._closed = self._closed or error
        self._tell()

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else "" if self.connected else " (out of reach)"
        return f"<HubClient {self.url}, {len(self._nodes)} nodes{state}>"

    # --- who is there ---

    async def _watch(self) -> Line:
        greeting = m.Watch(m.VERSION, self._token)
        line, first = await open_line(
            self.url, greeting, (m.Joined, m.Present), ssl=self._ssl, timeout=self._timeout
        )
        self._seen: set[str] | None = set()
        self._take(first)
        return line

    async def _keep_watching(self, line: Line) -> None:
        attempt = 0
        while True:
            try:
                await self._follow(line)
            except WireLost as lost:
                self._lost = lost.reason
            except WsfedError as error:
                self._end(error)
                return
            finally:
                await line.wire.close()
            attempt = 0
            while self._lost:
                longest = min(_BACK_OFF[1], _BACK_OFF[0] * 2 ** min(attempt, 16))
                await asyncio.sleep(random.uniform(0, longest))
                attempt += 1
                try:
                    line = await self._watch()
                except WireLost as lost:
                    self._lost = lost.reason
                except WsfedError as error:  # there is no use in trying again
                    self._end(error)
                    return
                else:
                    self._lost = ""

    async def _follow(self, line: Line, *, until_present: bool = False) -> None:
        while not (until_present and self._seen is None):
            self._take(await line.hear())

    def _take(self, news: m.Message) -> None:
        match news:
            case m.Joined(name, profile, tags, capabilities, since):
                if self._seen is not None:
                    self._seen.add(name)
                self._join(HubNode(name, profile, frozenset(tags), tuple(capabilities), since))
            case m.Left(name, reason):
                self._leave(name, reason)
            case m.Present():
                for name in set(self._nodes) - (self._seen or set()):
                    self._leave(name, "it was not there when the hub was reached again")
                self._seen = None
            case m.Refused(error, reason):
                raise WireLost(reason, error)
            case _:
                raise RemoteProtocolError(
                    "unexpected", f"{type(news).__name__} is not expected of a hub"
                )
        self._tell()

    def _join(self, node: HubNode) -> None:
        if len(self._nodes) >= limits.MAX_NODES and node.id not in self._nodes:
            raise RemoteProtocolError("too-many", f"more than {limits.MAX_NODES} nodes")
        if self._nodes.get(node.id) != node:
            self._nodes[node.id] = node
            self._happened(HubEvent("joined", node))

    def _leave(self, name: str, reason: str) -> None:
        node = self._nodes.pop(name, None)
        self._absent.pop(name, None)
        if node is not None:
            self._happened(HubEvent("left", node, reason))

    def _happened(self, event: HubEvent) -> None:
        for events in self._events:
            events.add(event)

    def _tell(self) -> None:
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    async def changed(self) -> None:
        """Wait until something has changed."""
        await self._changed.wait()

    def nodes(self, tags: Collection[str] = ()) -> list[HubNode]:
        """Those that are there and have all tags, in the order in which they came."""
        wanted = _tags(tags)
        found = [node for node in self._nodes.values() if wanted <= node.tags]
        return sorted(found, key=lambda node: node.since)

    def events(self) -> HubEvents:
        """Comings and goings: ``async for event in hub.events()``; begins with who is there."""
        events = HubEvents(self)
        self._events.add(events)
        return events

    # --- sessions ---

    def worker(
        self, id: str, *, token: str | None = None, reconnect: float | None = None
    ) -> Connecting:
        """Open a session with a node: ``await hub.worker(id)`` or ``async with hub.worker(id)``.

        It is what :func:`wsfed.connect` gives; ``partial(hub.worker, id)`` opens connections for
        :func:`wsfed.federated.fit`.

        Args:
            id: the node's name.
            token: shown to the node, where that asks for one of its own.
            reconnect: seconds to go on trying when the connection breaks; by default the hub's.

        Raises:
            NodeUnavailable: there is no such node, it has left, or it does not answer.
            AuthenticationFailed: hub or node refuse the token.
            ConnectionLost: the hub is out of reach.
        """
        self._alive()
        connection = Connection(
            f"{id}@{self.url}",
            partial(call, self.url, id, token=self._token, ssl=self._ssl, timeout=self._timeout),
            asyncio.get_running_loop(),
            token=token,
            blocking=self._is_blocking,
            reconnect=self._reconnect if reconnect is None else reconnect,
        )
        worker = self._kind(id, connection)
        self._workers = {each for each in self._workers if each._installed} | {worker}
        connection.start()
        return Connecting(worker, connection)

    async def workers(
        self, tags: Collection[str] = (), *, token: str | None = None
    ) -> list[Worker]:
        """Sessions with all nodes that are there and have all tags.

        Called again, it gives the same sessions, and new ones for new nodes. A node that leaves
        meanwhile is left out.
        """
        opened = await asyncio.gather(*(self._session(node.id, token) for node in self.nodes(tags)))
        return [worker for worker in opened if worker is not None]

    async def wait_for(
        self,
        count: int,
        tags: Collection[str] = (),
        *,
        timeout: float | None = 60.0,
        token: str | None = None,
    ) -> list[Worker]:
        """Wait until so many nodes with all tags are there; gives sessions with the first ones.

        Args:
            count: how many.
            tags: that each has to have.
            timeout: seconds; ``None`` waits for ever.
            token: shown to the nodes, where they ask for one of their own.

        Raises:
            TooFewNodes: they did not come in time; its text tells who is there.
        """
        async with self._in_time(count, tags, timeout):
            while True:
                changed = self._changed
                there = await self._until(count, tags)
                opened = await asyncio.gather(*(self._session(each.id, token) for each in there))
                workers = [worker for worker in opened if worker is not None]
                if len(workers) >= count:
                    return workers[:count]
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE):
                        await changed.wait()
        raise AssertionError("it ends with a result or an error")

    async def wait_for_nodes(
        self, count: int, tags: Collection[str] = (), *, timeout: float | None = 60.0
    ) -> list[HubNode]:
        """Wait until so many nodes with all tags are there, and tell which: all that are there.

        For programs that open sessions themselves.

        Raises:
            TooFewNodes: they did not come in time; its text tells who is there.
        """
        async with self._in_time(count, tags, timeout):
            return await self._until(count, tags)
        raise AssertionError("it ends with a result or an error")

    @asynccontextmanager
    async def _in_time(
        self, count: int, tags: Collection[str], timeout: float | None
    ) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            having = [node.id for node in self.nodes(tags)]
            others = [node.id for node in self.nodes() if node.id not in having]
            absent = [reason for id, reason in self._absent.items() if id in having]
            there = [id for id in having if id not in self._absent]
            more = "; ".join(
                [*absent, *([] if self.connected else [f"the hub is out of reach: {self._lost}"])]
            )
            raise TooFewNodes(
                self.url, count, sorted(_tags(tags)), there, others, timeout or 0.0, more
            ) from None

    async def _until(self, count: int, tags: Collection[str]) -> list[HubNode]:
        while len(there := self.nodes(tags)) < count:
            self._alive()
            await self._changed.wait()
        self._alive()
        return there

    def _alive(self) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    async def _session(self, id: str, token: str | None) -> Worker | None:
        """The session with a node that ``workers`` gives, or ``None`` if it has just left."""
        there = self._own.get(id)
        if there is not None and not there.closed:
            return there
        over = [name for name, each in self._own.items() if each.closed]
        await asyncio.gather(*(self._own.pop(name)._end() for name in over))
        try:
            worker = await self.worker(id, token=token)
        except NodeUnavailable as lost:
            self._absent[id] = lost.reason
            return None
        self._own[id] = worker
        self._absent.pop(id, None)
        return worker


def _tags(tags: Iterable[str]) -> frozenset[str]:
    return frozenset([tags] if isinstance(tags, str) else tags)


class ReachingHub:
    """What ``hub`` returns: await it, or use it with ``async with``."""

    def __init__(self, client: HubClient) -> None:
        self._client = client

    def __await__(self) -> Generator[Any, None, HubClient]:
        return self._client.__aenter__().__await__()

    async def __aenter__(self) -> HubClient:
        return await self._client.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()


def hub(
    url: str,
    *,
    token: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10.0,
    reconnect: float = 10.0,
) -> ReachingHub:
    """Reach the nodes behind a hub: ``async with wsfed.hub(url) as hub``.

    Args:
        url: ``ws://host:port``, or ``wss://`` with TLS.
        token: shown to the hub.
        ssl: certificates to trust, for ``wss://`` (``ssl.create_default_context(cafile=…)``).
        timeout: seconds for a connection to be made.
        reconnect: seconds for which a session whose connection breaks is tried to be resumed: as
            long as a node needs to find a hub that was started again.

    Raises:
        ConnectionLost: no hub answers there.
        AuthenticationFailed: the hub refuses the token.
        RemoteProtocolError: what answers is no hub.
        ValueError: not the URL of a hub, or ``ssl`` without ``wss://``.
    """
    check_url(url, ssl)
    return ReachingHub(HubClient(url, token=token, ssl=ssl, timeout=timeout, reconnect=reconnect))
