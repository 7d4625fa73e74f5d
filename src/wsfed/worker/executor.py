"""One thread that works off what it is given, in order, away from the event loop.

The thread starts with the first piece of work (an idle session costs none) and is a daemon: a
kernel that never returns does not keep the process from ending.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Executor"]


class Executor:
    """A thread with a queue.

    Args:
        name: of the thread, as debuggers and profilers show it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], Any]) -> None:
        """Run ``work`` after everything submitted before; it must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._work.put(work)

    def stop(self) -> None:
        """End when the queue is empty. Does not wait."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # do not keep its tensors until the next piece comes
