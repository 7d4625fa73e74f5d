"""Objects from one worker to another: directly where they reach each other, else through here.

Whatever is issued on the receiving worker afterwards waits at a gate in its queue, so a program
goes on as if the objects were there. The first transfer between two workers also holds the sending
worker's queue while it tries the direct way: should that fail, the values are fetched as they were.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import torch

from wsfed.client.failures import Failures
from wsfed.errors import RemoteError
from wsfed.pointers.shapes import Meta
from wsfed.pointers.site import Site, capture_site
from wsfed.protocol import messages as m
from wsfed.protocol.session import Session as ProtocolSession
from wsfed.protocol.stream import Gate
from wsfed.tensors import outgoing

__all__ = ["transfer"]


class Session(Protocol):
    """What a transfer needs of either side: the client's end of a session."""

    url: str
    info: dict[str, Any]
    #: Which other workers this one is known to reach, by URL.
    reachable: dict[str, bool]
    session: ProtocolSession
    failures: Failures
    wake: asyncio.Event

    def issue(self, command: list[Any], site: Site | None = None) -> None:
        """Queue a command."""

    def ask(self, make: Callable[[int], list[Any]], site: Site | None = None) -> Awaitable[Any]:
        """Queue a request."""

    def fetch(
        self,
        id: int,
        site: Site | None = None,
        meta: Meta | None = None,
        *,
        gate: Gate | None = None,
    ) -> Awaitable[torch.Tensor]:
        """Ask for a value."""


def transfer(
    source: Session, ids: Sequence[int], target: Session, names: Sequence[int]
) -> Coroutine[Any, Any, None]:
    """Begin to copy objects; the coroutine, which has to run, ends when they are there.

    Args:
        source: the session that has them.
        ids: their identifiers there.
        target: the session that gets them.
        names: identifiers there that are not used yet.
    """
    site = capture_site()
    reachable = source.reachable.get(target.url)
    if reachable is None and not _may_reach(source, target):
        reachable = False
    if reachable is False:
        gate = target.session.sender.put_gate()
        return _finish(target, names, gate, _values(source, ids, site))
    ticket = secrets.token_bytes(16)
    target.issue(m.Receive(list(names), ticket).wire())
    gate = target.session.sender.put_gate()
    moved = source.ask(
        lambda request: m.Move(request, list(ids), list(names), target.url, ticket).wire(), site
    )
    hold = source.session.sender.put_gate() if reachable is None else None
    return _finish(target, names, gate, _directly(source, ids, target, moved, hold, site))


def _may_reach(source: Session, target: Session) -> bool:
    return bool(
        source.info.get("direct", True)
        and source.url.startswith(("ws://", "wss://"))
        and target.url.startswith(("ws://", "wss://"))
    )


async def _finish(
    target: Session,
    names: Sequence[int],
    gate: Gate,
    work: Awaitable[list[tuple[bool, torch.Tensor]] | None],
) -> None:
    """Open the gate whatever happens; values that came through here go in at its place."""
    try:
        for name, (requires_grad, value) in zip(names, await work or (), strict=False):
            gate.put_tensor(_store(name, requires_grad), outgoing(value))
    except Exception as error:
        target.failures.add_local(error)
    finally:
        gate.is_open = True
        target.wake.set()


def _store(name: int, requires_grad: bool) -> Callable[[int], list[Any]]:
    message = m.Store(name, 0, requires_grad, False)
    return lambda place: message.wire(tensor=place)


async def _directly(
    source: Session,
    ids: Sequence[int],
    target: Session,
    moved: Awaitable[None],
    hold: Gate | None,
    site: Site | None,
) -> list[tuple[bool, torch.Tensor]] | None:
    try:
        await moved
    except RemoteError as error:
        if hold is None or error.type != "WireLost":
            raise
        source.reachable[target.url] = False
        return await _values(source, ids, site, hold)
    else:
        source.reachable[target.url] = True
        return None
    finally:
        if hold is not None:
            hold.is_open = True
            source.wake.set()


def _values(
    source: Session, ids: Sequence[int], site: Site | None, hold: Gate | None = None
) -> Awaitable[list[tuple[bool, torch.Tensor]]]:
    asked = [source.fetch(id, site, gate=hold) for id in ids]
    if hold is not None:
        hold.is_open = True
        source.wake.set()

    async def gather() -> list[tuple[bool, torch.Tensor]]:
        values = [await future for future in asked]
        return [(value.requires_grad, value) for value in values]

    return gather()
