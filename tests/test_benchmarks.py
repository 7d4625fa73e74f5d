"""What is measured does the same everywhere; and what is shown is what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from benchmarks import cost, ours
from benchmarks.__main__ import medians, page
from benchmarks.tasks import EPOCH, TASKS, loss_of, write_data

import wsfed
from wsfed.worker.datasets import load


@pytest.mark.parametrize("name", TASKS)
async def test_a_step_is_that_of_torch(name: str) -> None:
    task = TASKS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = []
    async with wsfed.VirtualWorker("bob") as bob:
        for there in (False, True):
            model, x, y = task.start()
            if there:
                bob.send(model)
                x, y = bob.send(x), bob.send(y)
            optimizer = task.optimizer(model.parameters())
            for _ in range(2):
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                optimizer.step()
            losses.append(loss.detach() if not there else await loss.detach())
    torch.set_num_threads(threads)
    assert torch.equal(*losses)


async def test_repetitions_take_turns_and_the_first_is_not_counted() -> None:
    turns: list[str] = []

    def first() -> float:
        turns.append("first")
        return float(len(turns))

    async def second() -> float:
        turns.append("second")
        return 0.5

    assert await medians({"first": first, "second": second}, 3) == {"first": 5.0, "second": 0.5}
    assert turns == ["first", "second"] * 4


@pytest.fixture
def points(tmp_path: Path) -> wsfed.Dataset:
    """The data of the first task."""
    name, _, path = write_data(tmp_path)[1].partition("=")
    return load(name, path)


async def test_plans_and_runs_over_data_are_measured(points: wsfed.Dataset) -> None:
    task = dataclasses.replace(TASKS["MLP, SGD"], steps=EPOCH)
    async with wsfed.VirtualWorker("bob", datasets=[points]) as bob:
        assert await ours.plan(task, bob)() > 0
        assert await ours.over_data(task, bob)() > 0


async def test_every_way_to_wait_for_losses_runs() -> None:
    task = dataclasses.replace(TASKS["MLP, SGD"], steps=2)
    async with wsfed.VirtualWorker("bob") as bob:
        for losses in ("last", "asked", "awaited"):
            assert await ours.op_by_op(task, bob, losses)() > 0
        assert await ours.small_ops(10, bob)() > 0


def test_costs_are_told_and_shown() -> None:
    results = {
        "machine": {"torch": "2"},
        "training, ms a step": {"MLP": {"in-process torch": 1.0, "wsfed": 2.0}},
        "Costs": cost.breakdown(50),
    }
    shown = page(results)
    assert "| wsfed | 0.50 (2.00) |" in shown
    assert "| interception by torch |" in shown
