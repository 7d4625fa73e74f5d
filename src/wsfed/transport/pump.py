"""Moves frames between a wire and one end of a session, until one of them ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from wsfed.protocol import limits
from wsfed.protocol.codec import Buffer
from wsfed.transport.wire import Wire, WireLost

__all__ = ["End", "pump"]

#: A program that ends tells the other side, if that reads, and does not wait for long.
_GOODBYE_SECONDS: Final = 0.5


class End(Protocol):
    """What the pump drives: a session and what belongs to it.

    Attributes:
        wake: set by whoever gives the session something to send, and by whoever ends it.
        over: the connection has no more use once everything is sent.
    """

    wake: asyncio.Event

    @property
    def over(self) -> bool:
        """See the class."""

    def leave(self) -> None:
        """The program ends: what is sent now is the last. Must not raise."""

    def arrived(self, data: Buffer, now: float) -> None:
        """A message came. Must not raise."""

    def broken(self, error: Exception, now: float) -> None:
        """Something came that is no message. Must not raise."""

    def next_frame(self, now: float) -> Sequence[Buffer] | None:
        """The next frame to send."""

    def tick(self, now: float) -> None:
        """Time has passed."""

    @property
    def next_tick(self) -> float | None:
        """When to call :meth:`tick`."""


async def pump(wire: Wire, end: End) -> str:
    """Move frames until the wire is lost or the end is over; tells why.

    The wire is closed on return.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.ensure_future(_read(wire, end, loop))
    try:
        await _write(wire, end, loop, reader)
    except WireLost as lost:
        return lost.reason
    except asyncio.CancelledError:
        await _say_goodbye(wire, end, loop)
        raise
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await wire.close()
    return "closed"


async def _read(wire: Wire, end: End, loop: asyncio.AbstractEventLoop) -> None:
    try:
        while not end.over:
            end.arrived(await wire.receive(), loop.time())
    except WireLost:
        raise
    except Exception as error:
        end.broken(error, loop.time())
    finally:
        end.wake.set()


async def _write(
    wire: Wire, end: End, loop: asyncio.AbstractEventLoop, reader: asyncio.Future[None]
) -> None:
    while True:
        now = loop.time()
        due = end.next_tick
        if due is not None and now >= due:
            end.tick(now)
        frame = end.next_frame(now)
        if frame is not None:
            await _send(wire, frame)
        elif end.over:
            return
        elif reader.done():
            reader.result()  # the wire is lost
            return
        else:
            await _sleep(end, end.next_tick, now)


async def _send(wire: Wire, frame: Sequence[Buffer]) -> None:
    try:
        async with asyncio.timeout(limits.SILENCE_SECONDS):
            await wire.send(frame)
    except TimeoutError:
        raise WireLost("the other side does not read") from None


async def _say_goodbye(wire: Wire, end: End, loop: asyncio.AbstractEventLoop) -> None:
    """So that the other side does not wait for a return, as far as that takes no time."""
    end.leave()
    try:
        async with asyncio.timeout(_GOODBYE_SECONDS):
            while (frame := end.next_frame(loop.time())) is not None:
                await wire.send(frame)
    except (WireLost, TimeoutError):
        return


async def _sleep(end: End, due: float | None, now: float) -> None:
    try:
        async with asyncio.timeout(None if due is None else max(0.0, due - now)):
            await end.wake.wait()
    except TimeoutError:
        return
    end.wake.clear()
