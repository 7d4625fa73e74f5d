"""One thread, in order, away from the caller's."""

from __future__ import annotations

import subprocess
import sys
import threading

from wsfed.worker.executor import Executor


def test_work_is_done_in_order_on_one_thread_of_that_name() -> None:
    executor, done = Executor("bob"), threading.Event()
    seen: list[tuple[int, str]] = []
    for number in range(5):
        executor.submit(lambda n=number: seen.append((n, threading.current_thread().name)))
    executor.submit(done.set)
    assert done.wait(10)
    assert seen == [(number, "bob") for number in range(5)]
    executor.end()


def test_an_idle_executor_has_no_thread() -> None:
    before = threading.active_count()
    executor = Executor("idle")
    assert threading.active_count() == before
    executor.end()


def test_what_was_submitted_before_the_end_is_still_done() -> None:
    executor, done = Executor("bob"), threading.Event()
    executor.submit(done.set)
    executor.end()
    assert executor.join(10)
    assert done.is_set()


def test_a_program_that_ends_in_the_middle_of_a_kernel_ends_in_order() -> None:
    program = """
import torch
from wsfed.worker.executor import Executor
executor = Executor("bob")
matrix = torch.randn(700, 700)
started = __import__("threading").Event()
def work():
    started.set()
    while not executor.ending:
        torch.linalg.inv(matrix)
executor.submit(work)
started.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
