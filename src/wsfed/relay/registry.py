"""Who is enrolled with a hub, and who is told of it. Does no I/O."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.transport.line import Line

__all__ = ["Member", "Refusal", "Registry", "Traffic", "Watcher"]

#: Names in a sentence.
_NAMED: Final = 10
#: News that a watcher may leave unread beyond one for each node that may be there.
_UNREAD: Final = 1024


class Refusal(Exception):
    """The hub does not do what it was asked for.

    Attributes:
        code: a short word for programs.
        reason: a sentence for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(f"{reason} [{code}]")


@dataclass(slots=True)
class Traffic:
    """What went through the hub for one node."""

    #: Sessions at the moment, and since the node came.
    sessions: int = 0
    begun: int = 0
    #: Bytes to the node and from it.
    down: int = 0
    up: int = 0


@dataclass(slots=True, eq=False)
class Member:
    """A node that is enrolled."""

    announced: m.Enrol
    line: Line
    #: Seconds since 1970.
    since: int
    traffic: Traffic = field(default_factory=Traffic)
    #: Clients that wait for it to dial back.
    waiting: int = 0

    @property
    def name(self) -> str:
        """Of the node."""
        return self.announced.node

    def joined(self) -> m.Joined:
        """What watchers are told."""
        said = self.announced
        return m.Joined(said.node, said.profile, said.tags, said.capabilities, self.since)


class Watcher:
    """News for one client: who was there, and then who came and went."""

    def __init__(self, there: Iterator[Member], most: int) -> None:
        self._news: deque[m.Message] = deque(member.joined() for member in there)
        self._news.append(m.Present())
        self._most = len(self._news) + most
        self._changed = asyncio.Event()
        self._changed.set()

    def tell(self, news: m.Message) -> None:
        """Add news; one too many, and the next look at it fails."""
        if len(self._news) <= self._most:
            self._news.append(news)
        self._changed.set()

    async def next(self) -> m.Message:
        """The next news.

        Raises:
            Refusal: too much was left unread.
        """
        while not self._news:
            self._changed.clear()
            await self._changed.wait()
        if len(self._news) > self._most:
            raise Refusal("slow", "too much news was left unread")
        return self._news.popleft()


class Registry:
    """Nodes by name.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int = limits.MAX_NODES) -> None:
        self._most = most
        self._members: dict[str, Member] = {}
        self._watchers: set[Watcher] = set()
        #: Of all nodes that ever were there.
        self.total = Traffic()

    @property
    def members(self) -> Mapping[str, Member]:
        """Those that are there, in the order in which they came."""
        return MappingProxyType(self._members)

    @property
    def watchers(self) -> int:
        """How many clients are told of it."""
        return len(self._watchers)

    def find(self, name: str) -> Member:
        """The node of that name.

        Raises:
            Refusal: there is none.
        """
        member = self._members.get(name)
        if member is None:
            raise Refusal("no-node", f"there is no node {name!r}; {self._who()}")
        return member

    def _who(self) -> str:
        names = [repr(name) for name in list(self._members)[:_NAMED]]
        more = len(self._members) - len(names)
        told = ", ".join(names) + (f" and {more} more" if more else "")
        return f"there is {told}" if names else "none is enrolled"

    def add(self, member: Member) -> None:
        """A node is there, in the place of the one of its name, if there is one.

        Raises:
            Refusal: the hub is full.
        """
        before = self._members.get(member.name)
        if before is None and len(self._members) >= self._most:
            raise Refusal("busy", f"the hub has {self._most} nodes and takes no more")
        if before is not None:
            member.traffic = before.traffic
        self._members[member.name] = member
        if before is None or before.joined() != member.joined():
            self._tell(member.joined())

    def remove(self, member: Member, reason: str) -> None:
        """A node is gone, unless another connection has taken its place."""
        if self._members.get(member.name) is member:
            del self._members[member.name]
            self._tell(m.Left(member.name, reason[: limits.MAX_TEXT]))

    def _tell(self, news: m.Message) -> None:
        for watcher in self._watchers:
            watcher.tell(news)

    def watch(self) -> Watcher:
        """Begin to be told.

        Raises:
            Refusal: too many are.
        """
        if len(self._watchers) >= limits.MAX_WATCHERS:
            raise Refusal("busy", "the hub tells too many clients already who is there")
        watcher = Watcher(iter(self._members.values()), self._most + _UNREAD)
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Nobody listens any more."""
        self._watchers.discard(watcher)
