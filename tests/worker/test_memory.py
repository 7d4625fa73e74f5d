"""Memory that is freed and asked for again; each measured in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings"
)

_PROGRAM = """
import resource, threading
from wsfed.worker.memory import give_back_memory, keep_memory

def step():
    made = [b"x" * (800_000 + number) for number in range(6)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def work():
    step()
    before = faults()
    for _ in range(20):
        step()
    print(faults() - before)
    held = resident()
    give_back_memory()
    print(held - resident())

{begin}
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def _run(begin: str) -> tuple[int, int]:
    """Page faults of twenty steps in a thread, and bytes that go back in the end."""
    program = _PROGRAM.replace("{begin}", begin)
    made = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    faults, given = map(int, made.stdout.split())
    return faults, given


def test_freed_memory_is_used_again_and_given_back_in_the_end() -> None:
    without, _ = _run("")
    faults, given = _run("assert keep_memory()")
    pages = 20 * 6 * 800_000 // 4096
    assert without > pages // 2  # else there is nothing to keep
    assert faults < pages // 50
    assert given > 4_000_000
