"""An event loop in a thread of its own, for programs that do not write ``await``.

One loop serves every blocking worker of the process, so that tensors can move between them. It
starts with the first worker and ends with the last, or with the interpreter.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from wsfed.errors import LocalProtocolError

__all__ = ["BackgroundLoop", "background"]

_T = TypeVar("_T")


class BackgroundLoop:
    """A loop that runs while somebody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> asyncio.AbstractEventLoop:
        """One user more; gives the running loop."""
        with self._lock:
            if self._loop is None:
                self._start()
            self._users += 1
            assert self._loop is not None
            return self._loop

    def release(self) -> None:
        """One user less; the last one ends the loop."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._stop()

    @property
    def running(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def run(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work`` there and wait for its result; Ctrl-C cancels it, and waits for its end.

        Raises:
            LocalProtocolError: this is the loop's own thread.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise LocalProtocolError("deadlock", "a blocking call inside the event loop's thread")
        begun: list[asyncio.Task[_T]] = []
        over = threading.Event()

        def begin() -> None:
            begun.append(loop.create_task(_contained(work)))
            begun[0].add_done_callback(lambda _: over.set())

        loop.call_soon_threadsafe(begin)
        try:
            over.wait()
        except BaseException:
            loop.call_soon_threadsafe(lambda: begun[0].cancel())
            over.wait()
            raise
        try:
            return begun[0].result()
        except _Exiting as exiting:
            raise exiting.error from None

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(loop,), name="wsfed", daemon=True)
        self._loop = loop
        self._thread.start()
        atexit.register(self._stop)

    def _stop(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        atexit.unregister(self._stop)
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop)
        thread.join(timeout=5)


class _Exiting(Exception):
    """Something wants to end the program, and not only the loop and its thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _contained(work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise _Exiting(error) from None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    asyncio.get_running_loop().stop()


#: The process's loop for blocking workers.
background = BackgroundLoop()
