"""What is measured of secure aggregation is a whole round that comes to the right sum."""

from __future__ import annotations

import pytest
from benchmarks.secagg import STEPS, bytes_per_parameter, main, play


@pytest.mark.parametrize("lost", [0, 2])
def test_a_round_is_measured_that_adds_up(lost: int) -> None:
    cost = play(7, 20_000, lost)
    assert cost.error < 1e-8
    counts = [len(cost.worker[step]) for step in range(len(STEPS))]
    assert counts == [7, 7, 7, 7 - lost, 7 - lost, 7 - lost]
    assert cost.of_a_worker > 0
    assert set(cost.collector) == {"adding vectors", "signatures", "removing masks"}


async def test_a_worker_sends_little_more_than_four_bytes_for_a_parameter() -> None:
    """Of a round of training over sockets: the goal is 4.1."""
    sent = await bytes_per_parameter(100_000)
    assert len(sent) == 5
    assert all(4.0 < each < 4.1 for each in sent), sent


@pytest.mark.blocking
def test_figures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--workers", "4", "--parameters", "2000"])
    shown = capsys.readouterr().out
    assert "4 workers, 2,000 parameters" in shown
    assert "bytes up per parameter" in shown
