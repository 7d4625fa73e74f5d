"""One thread, in order, away from the caller's."""

from __future__ import annotations

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
    executor.stop()


def test_an_idle_executor_has_no_thread() -> None:
    before = threading.active_count()
    executor = Executor("idle")
    assert threading.active_count() == before
    executor.stop()


def test_what_was_submitted_before_the_stop_is_still_done() -> None:
    executor, done = Executor("bob"), threading.Event()
    executor.submit(done.set)
    executor.stop()
    assert done.wait(10)
