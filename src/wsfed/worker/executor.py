"""One thread that works off what it is given, in order, away from the event loop.

The thread starts with the first piece of work (an idle session costs none). It is a daemon, so
that a kernel that never returns does not keep the process from ending. A thread that comes back
from a kernel while the interpreter shuts down would end the process with an abort: whoever ends it
waits for it for a while, and so does the interpreter's end.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Executor"]

#: Seconds that the interpreter's end waits for a kernel to come back.
_PATIENCE: Final = 5.0


class Executor:
    """A thread with a queue.

    Args:
        name: of the thread, as debuggers and profilers show it.
        begin: called in the thread before anything else.

    Attributes:
        ending: set when the end is wanted; long work looks at it and hurries.
    """

    def __init__(self, name: str, begin: Callable[[], Any] = lambda: None) -> None:
        self.ending = False
        self._name, self._begin = name, begin
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given = self._done = 0

    @property
    def is_idle(self) -> bool:
        """Whether everything that was submitted is done; for the thread that submits."""
        return self._given == self._done

    def submit(self, work: Callable[[], Any]) -> None:
        """Run ``work`` after everything submitted before; it must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)
        self._given += 1
        self._work.put(work)

    def end(self) -> None:
        """End when what was submitted is done. Does not wait."""
        self.ending = True
        self._work.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the end; whether it came. Blocks: not for an event loop's thread."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _at_exit(self) -> None:
        self.end()
        self.join(_PATIENCE)

    def _run(self) -> None:
        self._begin()
        while (work := self._work.get()) is not None:
            work()
            self._done += 1
            del work  # do not keep its tensors until the next piece comes
        atexit.unregister(self._at_exit)
