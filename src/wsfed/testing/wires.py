"""Wires for tests: recorded ones, ones that break, and a worker's handle over any of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from wsfed.client.connection import Connection
from wsfed.client.worker import Worker
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer, decode
from wsfed.transport.wire import Wire, WireLost

__all__ = ["FaultyWire", "OpenWire", "Recorder", "worker_over"]

#: Makes a connection.
OpenWire: TypeAlias = Callable[[], Awaitable[Wire]]


@asynccontextmanager
async def worker_over(
    open_wire: OpenWire, *, url: str = "test:", reconnect: float = 0.0
) -> AsyncIterator[Worker]:
    """A worker's handle over a wire of your own.

    Args:
        open_wire: makes the connection, and makes it again after it broke.
        url: shown in errors.
        reconnect: seconds to go on trying after the connection broke.

    Raises:
        ConnectionLost: no connection could be made.
    """
    connection = Connection(url, open_wire, asyncio.get_running_loop(), reconnect=reconnect)
    worker = Worker("", connection)
    connection.start()
    async with worker:
        yield worker


@dataclass
class Recorder:
    """Keeps every frame that passes through the wires it wraps.

    Attributes:
        frames: ``"sent"`` or ``"received"`` (by the client), and the bytes.
    """

    frames: list[tuple[str, bytes]] = field(default_factory=list)

    def wrap(self, open_wire: OpenWire) -> OpenWire:
        """The same, recorded."""

        async def opened() -> Wire:
            return _RecordedWire(await open_wire(), self.frames)

        return opened

    def messages(self) -> list[tuple[str, m.Message]]:
        """Every message, in the order in which it passed."""
        kinds = (m.CONTROL, m.COMMANDS, m.REPLIES, m.STREAM)
        return [
            (direction, m.parse(raw, kinds))
            for direction, data in self.frames
            for raw in decode(data).messages
        ]

    @property
    def round_trips(self) -> int:
        """How often the client waited: requests that were answered before more was asked."""
        trips, waiting = 0, False
        for direction, message in self.messages():
            if direction == "sent" and message.kind == m.COMMANDS and hasattr(message, "request"):
                waiting = True
            elif direction == "received" and message.kind == m.REPLIES and waiting:
                trips, waiting = trips + 1, False
        return trips

    def nbytes(self, direction: str) -> int:
        """Bytes that passed in one direction."""
        return sum(len(data) for way, data in self.frames if way == direction)


class _RecordedWire:
    def __init__(self, wire: Wire, frames: list[tuple[str, bytes]]) -> None:
        self._wire, self._frames = wire, frames

    async def send(self, message: Sequence[Buffer]) -> None:
        self._frames.append(("sent", b"".join(message)))
        await self._wire.send(message)

    async def receive(self) -> Buffer:
        message = await self._wire.receive()
        self._frames.append(("received", bytes(message)))
        return message

    async def close(self, reason: str = "") -> None:
        await self._wire.close(reason)


class FaultyWire:
    """A wire that is lost after so many messages; the one it would break on may get through.

    Args:
        wire: what it wraps.
        messages: how many pass, both directions together.
    """

    def __init__(self, wire: Wire, messages: int) -> None:
        self._wire, self._left = wire, messages

    async def send(self, message: Sequence[Buffer]) -> None:
        """See :class:`~wsfed.transport.wire.Wire`."""
        await self._count()
        await self._wire.send(message)

    async def receive(self) -> Buffer:
        """See :class:`~wsfed.transport.wire.Wire`."""
        message = await self._wire.receive()
        await self._count()
        return message

    async def close(self, reason: str = "") -> None:
        """See :class:`~wsfed.transport.wire.Wire`."""
        await self._wire.close(reason)

    async def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            await self._wire.close("broken on purpose")
            raise WireLost("broken on purpose")
