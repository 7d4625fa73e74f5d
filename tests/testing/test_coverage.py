"""torch's own databases of operators, modules and optimizers, on a worker process.

Here a spread of the samples; ``scripts/test --all`` runs every one and writes docs/coverage.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from wsfed import sync
from wsfed.pointers import calls
from wsfed.testing import coverage, worker_process
from wsfed.testing.coverage import Outcome

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def worker() -> Iterator[sync.Worker]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them make sums in another order, now and then
    try:
        with (
            worker_process("--threads", "1") as started,
            sync.connect(started["url"]) as connected,
        ):
            yield connected
    finally:
        torch.set_num_threads(threads)


def failures(outcomes: Iterable[Outcome]) -> tuple[int, list[str]]:
    ran = [each for each in outcomes if not each.excluded]
    return len(ran), [str(each) for each in ran if each.failed or not each.passed]


def test_operators(worker: sync.Worker) -> None:
    ran, failed = failures(coverage.operators(worker, most=1))
    assert not failed, "\n".join(failed)
    assert ran >= 0.95 * 702


def test_modules(worker: sync.Worker) -> None:
    ran, failed = failures(coverage.modules(worker, most=2))
    assert not failed, "\n".join(failed)
    assert ran >= 114


def test_optimizers(worker: sync.Worker) -> None:
    ran, failed = failures(coverage.optimizers(worker, most=3))
    assert not failed, "\n".join(failed)
    assert ran >= 14


def test_what_is_wrong_is_found(worker: sync.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner itself: an operator that does something else on the worker fails."""
    name_of = calls.wire_name
    monkeypatch.setattr(calls, "wire_name", lambda f: "torch.cos" if f is torch.sin else name_of(f))
    (outcome,) = coverage.operators(worker, most=1, names=["sin"])
    assert set(outcome.failed) == {"forward", "backward", "out="}
    assert "other values" in str(outcome)


def test_what_is_not_run_has_a_reason(worker: sync.Worker) -> None:
    (outcome,) = coverage.operators(worker, names=["empty_like"])
    assert "uninitialised" in outcome.excluded
    assert str(outcome) == f"empty_like: excluded, {outcome.excluded}"
