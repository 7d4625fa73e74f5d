"""Hubs, nodes and clients for tests, by hand and whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import wsfed
from wsfed.protocol import messages as m
from wsfed.relay import Hub
from wsfed.transport.line import Line, answer, open_line
from wsfed.transport.wire import Wire


async def until(condition: Callable[[], object]) -> None:
    """Turn after turn of the loop, until it holds; the test's own timeout ends it."""
    while not condition():
        await asyncio.sleep(0)


@asynccontextmanager
async def enrolled(
    url: str, *names: str, tags: Sequence[str] = (), token: str | None = None
) -> AsyncIterator[list[wsfed.Node]]:
    """Nodes that a hub knows."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(wsfed.Node(name)) for name in names]
        for node in nodes:
            enrolment = await stack.enter_async_context(node.enrol(url, tags=tags, token=token))
            await enrolment.enrolled.wait()
        yield nodes


def announcement(name: str, key: bytes = b"k" * 16) -> m.Enrol:
    """What a node of that name says first."""
    return m.Enrol(m.VERSION, None, name, key, "torch", ["digits"], ["torch/2"])


@asynccontextmanager
async def enrolled_by_hand(url: str, name: str, key: bytes = b"k" * 16) -> AsyncIterator[Line]:
    """A node that does nothing by itself."""
    line, _ = await open_line(url, announcement(name, key), (m.Enrolled,))
    try:
        yield line
    finally:
        await line.wire.close()


async def rung(line: Line) -> bytes:
    """The ticket of the next client."""
    said = await line.hear()
    assert isinstance(said, m.Ring)
    return said.ticket


async def joined(url: str, line: Line, calling: asyncio.Task[Wire]) -> tuple[Wire, Wire]:
    """The ends of a client that calls and a node that answers."""
    node = await answer(url, await rung(line))
    return await calling, node


def abort(wire: Wire) -> None:
    """Cut a connection as a killed process does."""
    wire._socket.transport.abort()  # type: ignore[attr-defined]


def lines(hub: Hub) -> dict[str, Line]:
    """The hub's ends of its nodes' lines."""
    return {name: member.line for name, member in hub.registry.members.items()}
