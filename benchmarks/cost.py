"""Where the time of one operation goes, and whether it grows."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import wsfed
from wsfed.client.connection import Connection
from wsfed.pointers import optimizers
from wsfed.pointers.site import capture_site
from wsfed.protocol.codec import pack

__all__ = ["breakdown", "growth", "memory_of", "of_a_step"]

_COUNT = 5000


def _microseconds(work: Callable[[], Any], count: int = _COUNT) -> float:
    for _ in range(count // 10):
        work()
    begun = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - begun) / count * 1e6


class _Intercepted(torch.Tensor):
    """What a Tensor subclass costs that does nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None


@contextmanager
def _unconnected() -> Iterator[wsfed.Worker]:
    """A worker's handle whose commands are queued and never leave."""

    async def never() -> Any:
        await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    try:
        yield wsfed.Worker("nobody", Connection("nowhere:", never, loop))
    finally:
        optimizers.uninstall()
        loop.close()


def breakdown(count: int = 5000) -> dict[str, float]:
    """Of ``x + y`` on pointers: µs of CPU of the client, by what they are for."""
    with _unconnected() as worker:
        return _breakdown(worker, count)


def _breakdown(worker: wsfed.Worker, count: int) -> dict[str, float]:
    x, y = worker.send(torch.ones(16)), worker.send(torch.ones(16))
    bare = torch.empty(16, device="meta")
    bare.__class__ = _Intercepted
    meta = torch.empty(16, device="meta")
    command = [33, 7, [1234], [[0, 12], [0, 13]], {}, 0]
    local = torch.ones(16)
    return {
        "all of it": _microseconds(lambda: x + y, count),
        "interception by torch": _microseconds(lambda: bare + bare, count),
        "an empty meta tensor": _microseconds(
            lambda: torch.empty_strided((16,), (1,), dtype=torch.float32, device=meta.device),
            count,
        ),
        "the user's line": _microseconds(capture_site, count),
        "packing": _microseconds(lambda: pack(command), count),
        "the same in local torch": _microseconds(lambda: local + local, count),
    }


def growth() -> dict[str, float]:
    """The cost of an operation does not depend on how many pointers there are."""
    found: dict[str, float] = {}
    with _unconnected() as worker:
        x, kept = worker.send(torch.ones(16)), list[Any]()
        for many in (10, 1000, 100_000):
            while len(kept) < many:
                kept.append(x + 1.0)
            gc.collect()  # Python's collector may be due just now, which is another cost
            found[f"{many:,}"] = _microseconds(lambda: x + x)
    return found


async def of_a_step(
    repetition: Callable[[], Awaitable[float]], steps: int, process: int
) -> dict[str, float]:
    """Milliseconds of CPU of one step by thread: the client's, the worker's two; and all of it."""
    threads, client = _threads(process), time.process_time()
    seconds = await repetition()
    client = time.process_time() - client
    worked = {thread: spent - threads.get(thread, 0) for thread, spent in _threads(process).items()}
    loop = worked.pop(str(process))
    return {
        "client": client / steps * 1e3,
        "worker, event loop": loop / steps * 1e3,
        "worker, operations": max(worked.values()) / steps * 1e3,
        "from the first to the last": seconds / steps * 1e3,
    }


def _threads(process: int) -> dict[str, float]:
    """Seconds of CPU of each thread."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return {each.name: int((each / "schedstat").read_text().split()[0]) / 1e9 for each in tasks}


def memory_of(process: int) -> float:
    """MiB that a process has in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 2**20
