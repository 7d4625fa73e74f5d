"""The pump moves frames until one side ends, and leaves who does not read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import pytest

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol.codec import Buffer
from wsfed.transport.memory import pair
from wsfed.transport.pump import pump


class Side:
    """An end that sends what it is given and keeps what comes."""

    def __init__(self, *frames: bytes) -> None:
        self.wake = asyncio.Event()
        self.frames = deque(frames)
        self.came: list[bytes] = []
        self.errors: list[Exception] = []
        self.ticks: list[float] = []
        self.over = False
        self.next_tick: float | None = None

    def arrived(self, data: Buffer, now: float) -> None:
        self.came.append(bytes(data))
        self.wake.set()

    def broken(self, error: Exception, now: float) -> None:
        self.errors.append(error)
        self.over = True

    def next_frame(self, now: float) -> Sequence[Buffer] | None:
        return [self.frames.popleft()] if self.frames else None

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.next_tick = None
        self.over = True


async def test_what_is_queued_leaves_before_the_end() -> None:
    near, far = pair()
    side = Side(b"a", b"b")
    side.over = True
    assert await pump(near, side) == "closed"
    assert [bytes(await far.receive()) for _ in range(2)] == [b"a", b"b"]


async def test_frames_go_both_ways_until_the_wire_is_lost() -> None:
    near, far = pair()
    one, other = Side(b"1"), Side(b"2")
    tasks = [asyncio.ensure_future(pump(near, one)), asyncio.ensure_future(pump(far, other))]
    while not (one.came and other.came):
        await asyncio.sleep(0)
    await near.close("enough")
    assert await asyncio.gather(*tasks) == ["enough", "enough"]
    assert (one.came, other.came) == ([b"2"], [b"1"])


async def test_a_wake_makes_it_look_for_frames_again() -> None:
    near, far = pair()
    side = Side()
    task = asyncio.ensure_future(pump(near, side))
    await asyncio.sleep(0)
    side.frames.append(b"late")
    side.wake.set()
    assert bytes(await far.receive()) == b"late"
    await far.close()
    await task


async def test_time_is_told_when_it_is_due() -> None:
    near, _ = pair()
    side = Side()
    side.next_tick = asyncio.get_running_loop().time() + 0.01
    due = side.next_tick
    await pump(near, side)
    assert len(side.ticks) == 1
    assert side.ticks[0] >= due


async def test_what_is_no_message_ends_it() -> None:
    near, _ = pair()

    class Broken(type(near)):  # type: ignore[misc]
        async def receive(self) -> Buffer:
            raise RemoteProtocolError("text", "only binary")

    near.__class__ = Broken
    side = Side()
    await pump(near, side)
    assert [str(error) for error in side.errors] == ["only binary [text]"]


async def test_a_side_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.05)
    near, _ = pair()
    side = Side(*[b"x"] * 100)
    assert await pump(near, side) == "the other side does not read"
