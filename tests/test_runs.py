"""Runs over data sets: a plan for each batch, in one message, is the loop over the batches."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import wsfed
from tests.pointers.oracle import assert_same_bits
from tests.steps import LABELS, OPTIMIZERS, ROWS, model, step_of
from wsfed import sync

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bob() -> Iterator[sync.VirtualWorker]:
    data = wsfed.Dataset("points", {"x": ROWS, "y": LABELS})
    open_data = wsfed.Dataset("open", {"x": ROWS, "y": LABELS}, open=True)
    with sync.VirtualWorker("bob", datasets=[data, open_data]) as worker:
        yield worker


@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam", "RAdam"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_run_over_a_data_set_is_the_loop(
    name: str, shuffle: bool, bob: sync.VirtualWorker
) -> None:
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS[name](local.parameters()), OPTIMIZERS[name](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    data = bob.dataset("points")
    expected = list(local_epochs(train, 3, shuffle=shuffle))
    run = data.run(plan, epochs=3, batch_size=16, shuffle=shuffle)
    assert run.result().tolist() == expected
    assert (run.stopped, run.done, run.total) == ("", 12, 12)
    # The optimizer goes on where it is.
    again = data.run(plan, epochs=1, batch_size=16, shuffle=shuffle)
    assert again.result().tolist() == list(local_epochs(train, 1, shuffle=shuffle))
    for one, other in zip(remote.parameters(), local.parameters(), strict=True):
        assert_same_bits(one.detach(), other)


def local_epochs(
    train: Callable[[Any, Any], Any], epochs: int, *, shuffle: bool = True
) -> Iterator[float]:
    for epoch in range(epochs):
        order = torch.arange(50)
        if shuffle:
            order = torch.randperm(50, generator=torch.Generator().manual_seed(epoch))
        for start in range(0, 50, 16):
            chosen = order[start : start + 16]
            yield train(ROWS[chosen], LABELS[chosen]).item()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_run_ends_when_a_condition_holds(name: str, bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS[name](local.parameters()), OPTIMIZERS[name](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    losses = local_epochs(train, 50)
    expected: list[float] = []
    while not expected or expected[-1] > 1.0:
        expected.append(next(losses))
    run = bob.dataset("points").run(
        plan, epochs=50, batch_size=16, shuffle=True, until=lambda loss: loss <= 1.0
    )
    assert run.result().tolist() == expected
    assert run.stopped == "until"
    x, y = ROWS[:16], LABELS[:16]  # counted as many steps as were done
    assert_same_bits(plan(bob.send(x), bob.send(y)).detach(), train(x, y))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_batches_before_one_that_cannot_be_run_are_run(name: str) -> None:
    data = wsfed.Dataset("points", {"x": ROWS[:33], "y": LABELS[:33]})
    with sync.VirtualWorker("carol", datasets=[data]) as carol:
        local = nn.Sequential(nn.Linear(ROWS.shape[1], 8), nn.BatchNorm1d(8), nn.Linear(8, 9))
        remote = carol.send(copy.deepcopy(local))
        train = step_of(local, OPTIMIZERS[name](local.parameters()))
        plan = wsfed.plan(step_of(remote, OPTIMIZERS[name](remote.parameters())))
        for start in (0, 16):
            train(ROWS[start : start + 16], LABELS[start : start + 16])
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            carol.dataset("points").run(plan, batch_size=16)  # 16, 16, and 1
        carol.flush()
        x, y = ROWS[:16], LABELS[:16]
        assert_same_bits(plan(carol.send(x), carol.send(y)).detach(), train(x, y))


async def test_a_run_reports_while_it_runs_and_can_be_stopped() -> None:
    data = wsfed.Dataset("points", {"x": ROWS, "y": LABELS})
    async with wsfed.VirtualWorker("carol", datasets=[data]) as carol:
        remote = carol.send(model())
        optimizer = torch.optim.Adam(remote.parameters())
        train = step_of(remote, optimizer)
        plan = wsfed.plan(lambda x, y: {"loss": train(x, y), "rows": (y >= 0).sum()})
        points = await carol.dataset("points")
        run = points.run(plan, epochs=200, batch_size=10)
        seen = []
        async for progress in run:
            seen.append(progress)
            if len(seen) == 3:
                run.stop()
        values = await run
        assert run.stopped == "stop"
        assert 3 <= run.done == len(seen) == len(values["loss"]) < run.total == 1000
        assert seen[-1].done == run.done and seen[7].epoch == 1
        assert values["rows"].tolist() == [10.0] * run.done
        first = next(iter(optimizer.state.values()))
        assert first["step"] == run.done


async def test_a_run_delays_nobody() -> None:
    data = wsfed.Dataset("points", {"x": ROWS, "y": LABELS})
    async with (
        wsfed.Node("dora", datasets=[data]) as node,
        node.listen() as url,
        wsfed.connect(url) as one,
        wsfed.connect(url) as two,
    ):
        remote = one.send(model())
        plan = wsfed.plan(step_of(remote, torch.optim.SGD(remote.parameters(), lr=0.1)))
        run = (await one.dataset("points")).run(plan, epochs=100_000, batch_size=10)
        async for _ in run:
            break
        assert (await (two.send(torch.ones(2)) + 1)).tolist() == [2, 2]
        one.cancel()
        await run
        assert run.stopped == "stop"


def test_an_optimizer_waits_for_a_run_that_may_end_early(bob: sync.VirtualWorker) -> None:
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS["Adam"](local.parameters()), OPTIMIZERS["Adam"](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    data = bob.dataset("points")
    first = data.run(plan, epochs=5, batch_size=16, shuffle=True, until=lambda loss: loss < 100)
    if not first.stopped:
        with pytest.raises(wsfed.PlanError, match="await that run first"):
            data.run(plan, epochs=1, batch_size=16, shuffle=True)
    losses = local_epochs(train, 1)
    assert first.result().tolist() == [next(losses)]
    again = data.run(plan, epochs=1, batch_size=16, shuffle=True).result()
    assert again.tolist() == list(local_epochs(train, 1))


async def test_cancelling_who_awaits_a_run_stops_it() -> None:
    data = wsfed.Dataset("points", {"x": ROWS, "y": LABELS})
    async with wsfed.VirtualWorker("carol", datasets=[data]) as carol:
        remote = carol.send(model())
        plan = wsfed.plan(step_of(remote, torch.optim.SGD(remote.parameters(), lr=0.1)))
        run = (await carol.dataset("points")).run(plan, epochs=100_000, batch_size=10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await run
        await run
        assert run.stopped == "stop" and run.done < run.total


async def test_a_run_ends_with_its_worker() -> None:
    data = wsfed.Dataset("points", {"x": ROWS, "y": LABELS})
    async with wsfed.VirtualWorker("carol", datasets=[data]) as carol:
        remote = carol.send(model())
        plan = wsfed.plan(step_of(remote, torch.optim.SGD(remote.parameters(), lr=0.1)))
        run = (await carol.dataset("points")).run(plan, epochs=100_000, batch_size=10)
    with pytest.raises(wsfed.ConnectionLost):
        await run
    assert run.stopped == "error"


def test_a_run_gives_numbers_and_no_rows(bob: sync.VirtualWorker) -> None:
    data = bob.dataset("points")
    with pytest.raises(wsfed.PlanError, match=r"a number for each batch, not \[10, 6\]"):
        data.run(wsfed.plan(lambda x, y: x * 2), batch_size=10)
    with pytest.raises(wsfed.GetNotPermitted, match="rows of the private data set 'points'"):
        data.run(wsfed.plan(lambda x, y: x[0, 0]), batch_size=10).result()
    with pytest.raises(ValueError, match="at least one"):
        data.run(wsfed.plan(lambda x, y: x.sum()), batch_size=10, epochs=0)
    with pytest.raises(ValueError, match="no batch"):
        data.run(wsfed.plan(lambda x, y: x.sum()), batch_size=100, drop_last=True)
    with pytest.raises(wsfed.NotFound, match="no field 'z'"):
        data.run(wsfed.plan(lambda z: z.sum()), batch_size=10, fields=["z"])
    sums = bob.dataset("open").run(wsfed.plan(lambda x, y: x[0, 0]), batch_size=25).result()
    assert sums.tolist() == [ROWS[0, 0].item(), ROWS[25, 0].item()]


def test_rows_stay_rows_in_a_plan(bob: sync.VirtualWorker) -> None:
    x, _ = bob.dataset("points").batch(10, 0)
    target = bob.send(torch.zeros(10, 6))

    @wsfed.plan
    def write(rows: Any, into: Any) -> Any:
        into.view(-1)[:6].copy_(rows[0] * 1)
        return rows.t() + 1, rows.mean()

    for _ in range(3):
        turned, mean = write(x, target)
        assert mean.get() is not None
        for rows in (turned, target):
            with pytest.raises(wsfed.GetNotPermitted):
                rows.get()


@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam"])
@pytest.mark.parametrize(
    "until", [lambda loss: True, lambda loss: loss.item() < 1], ids=["no tensor", "a value"]
)
def test_what_cannot_end_a_run_leaves_the_plan_as_the_loop_would(
    name: str, until: Callable[[Any], Any], bob: sync.VirtualWorker
) -> None:
    """The first batch is done, as in a loop that looks at its value afterwards."""
    local, remote = model(), bob.send(model())
    here, there = OPTIMIZERS[name](local.parameters()), OPTIMIZERS[name](remote.parameters())
    train, plan = step_of(local, here), wsfed.plan(step_of(remote, there))
    data = bob.dataset("points")
    with pytest.raises(wsfed.PlanError):
        data.run(plan, batch_size=16, until=until)
    train(ROWS[:16], LABELS[:16])
    run = data.run(plan, epochs=2, batch_size=16)
    assert run.result().tolist() == list(local_epochs(train, 2, shuffle=False))
    loss = plan(bob.send(ROWS[:7]), bob.send(LABELS[:7]))
    assert loss.item() == train(ROWS[:7], LABELS[:7]).item()
    for one, other in zip(remote.parameters(), local.parameters(), strict=True):
        assert_same_bits(one.detach(), other)


def test_a_function_that_fails_in_its_first_batch_has_done_what_came_before(
    bob: sync.VirtualWorker,
) -> None:
    weight = bob.send(torch.ones(6))

    @wsfed.plan
    def step(x: Any, y: Any) -> Any:
        weight.add_(x.detach().sum(0))
        raise KeyError("a mistake")

    for sampled in (False, True):
        with pytest.raises(KeyError, match="a mistake"):
            if sampled:
                bob.dataset("points").run(
                    wsfed.plan(lambda x, y, w: step._function(x, y)), sample_rate=1.0, steps=2
                )
            else:
                bob.dataset("points").run(step, batch_size=16)
    expected = torch.ones(6) + ROWS[:16].sum(0) + ROWS.sum(0)
    assert_same_bits(weight.get(), expected)
