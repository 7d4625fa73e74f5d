"""What the C library does with memory that tensors no longer need.

A training step frees what it made, and the next one asks for as much again. glibc gives freed
memory back to the system early (``mallopt(3)``: above 128 KiB at first), in threads more often than
elsewhere, and each page that comes back costs a page fault: up to half of a step of a small model.
A worker keeps it between the steps, and gives it back when a session ends.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Final

__all__ = ["give_back_memory", "keep_memory"]

#: Of ``malloc.h``.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: As much as one heap of a thread, and the most that is taken from a heap at once.
_KEPT: Final = 64 * 2**20
_LARGEST: Final = 32 * 2**20
#: Freeing more than 64 KiB at once makes glibc look at the end of a heap.
_CONSOLIDATED: Final = 128 * 2**10


#: Whether this process keeps memory.
_keeps = False


def _function(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found


def keep_memory() -> bool:
    """Have this process keep freed memory for what comes next; whether its C library can.

    Tensors above 32 MiB have memory of their own, which goes back at once.
    """
    global _keeps
    mallopt = _function("mallopt")
    _keeps = mallopt is not None and bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _KEPT)
    )
    return _keeps


def give_back_memory() -> None:
    """Give what this thread has freed back to the system, where :func:`keep_memory` keeps it.

    Takes milliseconds: not for an event loop's thread.
    """
    mallopt, malloc_trim = _function("mallopt"), _function("malloc_trim")
    if not _keeps or mallopt is None or malloc_trim is None:
        return
    malloc_trim(0)
    # That leaves out the end of a thread's heap, which goes with the next large piece freed.
    mallopt(_M_TRIM_THRESHOLD, 0)
    try:
        bytes(_CONSOLIDATED)
    finally:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
