"""What every test is held to: the event loop is never blocked."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from blockbuster import blockbuster_ctx

#: Seconds of CPU that a step of wsfed's may hold the loop. CPU, not time on the clock: a busy
#: machine takes the processor away as it likes. Waiting is found by blockbuster.
SLOW = 0.3

#: What a test or a program computes on its own loop is its own affair.
_PROGRAMS = ("coro=<test_", "fixture", "/scripts/train.py")


class _Collections(threading.local):
    """Seconds of CPU of this thread that went into collecting the garbage of all tests so far."""

    seconds = 0.0
    _begun = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.thread_time()
        else:
            self.seconds += time.thread_time() - self._begun


_collections = _Collections()
gc.callbacks.append(_collections)


@contextmanager
def slow_steps() -> Iterator[list[str]]:
    """Collects the steps of event loops that take more than ``SLOW`` seconds of CPU."""
    found: list[str] = []
    run = asyncio.Handle._run  # type: ignore[attr-defined]

    def timed(handle: asyncio.Handle) -> None:
        begun = time.thread_time() - _collections.seconds
        try:
            run(handle)
        finally:
            took = time.thread_time() - _collections.seconds - begun
            if took > SLOW:
                found.append(f"{took:.3f} s: {_named(handle)}")

    asyncio.Handle._run = timed  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        asyncio.Handle._run = run  # type: ignore[attr-defined]


def _named(handle: asyncio.Handle) -> str:
    task = getattr(getattr(handle, "_callback", None), "__self__", None)
    return repr(task if isinstance(task, asyncio.Task) else handle)


@pytest.fixture(autouse=True, scope="session")
def torch_is_warm() -> None:
    """torch reads files of its own when an optimizer takes its first step; not ours to blame."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    for kind in (torch.optim.SGD, torch.optim.Adam):
        kind([parameter], lr=0.1).step()


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which wsfed holds up an event loop; ``blocking`` tests do so on purpose."""
    if request.node.get_closest_marker("blocking"):
        yield
        return
    with blockbuster_ctx("wsfed"), slow_steps() as found:
        yield
    slow = [step for step in found if not any(part in step for part in _PROGRAMS)]
    assert not slow, "the event loop was blocked:\n" + "\n".join(slow)


@pytest.fixture(autouse=True)
def loops_are_called_from_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """``call_soon`` of another thread's loop raises, as in asyncio's debug mode, which is slow."""
    call_soon = asyncio.BaseEventLoop.call_soon

    def checked(loop: asyncio.BaseEventLoop, *args: Any, **options: Any) -> asyncio.Handle:
        loop._check_thread()  # type: ignore[attr-defined]
        return call_soon(loop, *args, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon", checked)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads may sum up in another order each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
