"""The guards that watch over the other tests do bite."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from tests.conftest import SLOW, slow_steps


@pytest.mark.blocking
async def test_a_slow_step_is_found() -> None:
    with slow_steps() as found:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        loop.call_soon(busy, SLOW + 0.1)
        loop.call_soon(done.set)
        await done.wait()
        await asyncio.sleep(0)
    assert len(found) == 1
    assert "busy" in found[0]


@pytest.mark.blocking
async def test_a_step_that_the_machine_puts_off_is_not() -> None:
    with slow_steps() as found:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        loop.call_soon(time.sleep, SLOW + 0.1)
        loop.call_soon(done.set)
        await done.wait()
        await asyncio.sleep(0)
    assert not found


@pytest.mark.blocking
async def test_a_step_in_which_garbage_is_collected_is_not() -> None:
    heap = [[number] for number in range(1_500_000)]
    with slow_steps() as found:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        loop.call_soon(gc.collect)
        loop.call_soon(done.set)
        begun = time.thread_time()
        await done.wait()
        await asyncio.sleep(0)
        took = time.thread_time() - begun
    assert took > SLOW / 10
    assert len(heap) == 1_500_000
    assert not found


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.blocking
async def test_a_blocking_call_is_found() -> None:
    with blockbuster_ctx("tests"), pytest.raises(BlockingError):
        time.sleep(0.01)


async def test_a_call_from_another_thread_is_found() -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(RuntimeError, match="Non-thread-safe"):
        await asyncio.to_thread(loop.call_soon, busy, 0)
