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
    reader, alarm = asyncio.ensure_future(_read(wire, end, loop)), _Alarm(end, loop)
    try:
        await _write(wire, end, loop, reader, alarm)
    except WireLost as lost:
        return lost.reason
    except asyncio.CancelledError:
        await _say_goodbye(wire, end, loop)
        raise
    finally:
        alarm.cancel()
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
    wire: Wire,
    end: End,
    loop: asyncio.AbstractEventLoop,
    reader: asyncio.Future[None],
    alarm: _Alarm,
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
            await alarm.wait(end.next_tick)


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


class _Alarm:
    """Wakes an end when it is due. Set anew only for an earlier time: to be woken too early does
    no harm, and setting it for each frame would cost more than the frame.
    """

    def __init__(self, end: End, loop: asyncio.AbstractEventLoop) -> None:
        self._end, self._loop = end, loop
        self._handle: asyncio.TimerHandle | None = None

    async def wait(self, due: float | None) -> None:
        """Until the end is woken, by this or by something else."""
        if due is not None and (self._handle is None or due < self._handle.when()):
            self.cancel()
            self._handle = self._loop.call_at(due, self._ring)
        await self._end.wake.wait()
        self._end.wake.clear()

    def _ring(self) -> None:
        self._handle = None
        self._end.wake.set()

    def cancel(self) -> None:
        """Not any more."""
        if self._handle is not None:
            self._handle.cancel()
