"""Two ends of a wire within one process: the same bytes, no socket."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

from wsfed.protocol.codec import Buffer
from wsfed.transport.wire import WireLost

__all__ = ["MemoryWire", "pair"]

#: Messages under way: enough that neither end waits for the other's turn, few enough that a
#: reader that stops is noticed by the sender.
_CAPACITY: Final = 16


class _Lane:
    """One direction: messages under way, and whether anybody will take more of them."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.changed = asyncio.Condition()
        self.closed: str | None = None


class MemoryWire:
    """One end; made by :func:`pair`."""

    def __init__(self, incoming: _Lane, outgoing: _Lane) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    async def send(self, message: Sequence[Buffer]) -> None:
        """See :class:`~wsfed.transport.wire.Wire`."""
        lane = self._outgoing
        async with lane.changed:
            await lane.changed.wait_for(
                lambda: lane.closed is not None or len(lane.messages) < _CAPACITY
            )
            if lane.closed is not None:
                raise WireLost(lane.closed)
            lane.messages.append(b"".join(message))
            lane.changed.notify_all()

    async def receive(self) -> Buffer:
        """See :class:`~wsfed.transport.wire.Wire`."""
        lane = self._incoming
        async with lane.changed:
            await lane.changed.wait_for(lambda: lane.closed is not None or bool(lane.messages))
            if not lane.messages:
                raise WireLost(lane.closed or "closed")
            message = lane.messages.popleft()
            lane.changed.notify_all()
            return message

    async def close(self, reason: str = "") -> None:
        """See :class:`~wsfed.transport.wire.Wire`."""
        for lane in (self._incoming, self._outgoing):
            async with lane.changed:
                lane.closed = lane.closed or reason or "closed"
                lane.changed.notify_all()


def pair() -> tuple[MemoryWire, MemoryWire]:
    """Two connected ends."""
    there, back = _Lane(), _Lane()
    return MemoryWire(back, there), MemoryWire(there, back)
