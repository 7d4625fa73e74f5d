"""The guards that watch over the other tests do bite."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from tests.conftest import _SlowSteps


async def test_a_slow_callback_is_found() -> None:
    slow, logger = _SlowSteps(), logging.getLogger("asyncio")
    logger.addHandler(slow)
    logger.propagate = False
    try:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        loop.call_soon(busy, 0.6)
        loop.call_soon(done.set)
        await done.wait()
        await asyncio.sleep(0)
    finally:
        logger.removeHandler(slow)
        logger.propagate = True
    assert len(slow.found) == 1
    # The guard of this very test has seen it, too, and would fail it.
    for handler in logger.handlers:
        if isinstance(handler, _SlowSteps):
            handler.found.clear()


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.blocking
async def test_a_blocking_call_is_found() -> None:
    with blockbuster_ctx("tests"), pytest.raises(BlockingError):
        time.sleep(0.01)
