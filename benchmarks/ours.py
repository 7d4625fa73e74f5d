"""wsfed and in-process torch."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

import wsfed
from benchmarks.tasks import EPOCH, Task, loss_of
from wsfed import sync

__all__ = [
    *("blocking", "bulk", "get_scalar", "grown", "in_process", "op_by_op", "over_data", "plan"),
    "small_ops",
]


def _steps(
    task: Task, model: Any, x: Any, y: Any, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """All steps of a repetition, without waiting; gives the last loss."""
    for _ in range(task.steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
    return loss.detach()


def in_process(task: Task) -> Callable[[], float]:
    """The step in this process."""
    model, x, y = task.start()
    optimizer = task.optimizer(model.parameters())

    def repetition() -> float:
        begun = time.perf_counter()
        _steps(task, model, x, y, optimizer).item()
        return time.perf_counter() - begun

    return repetition


def op_by_op(
    task: Task, remote: wsfed.Worker, losses: str = "last"
) -> Callable[[], Awaitable[float]]:
    """The step through pointers.

    Args:
        task: what to do.
        remote: where.
        losses: ``"last"``: only the last loss is awaited; ``"asked"``: every one is asked for at
            once and awaited at the end; ``"awaited"``: every one is awaited in its step.
    """
    model, x, y = task.start()
    remote.send(model)
    inputs, labels = remote.send(x), remote.send(y)
    optimizer = task.optimizer(model.parameters())

    async def repetition() -> float:
        await remote.flush()
        begun = time.perf_counter()
        asked = []
        for _ in range(task.steps):
            optimizer.zero_grad()
            loss = loss_of(model, inputs, labels)
            loss.backward()
            optimizer.step()
            if losses != "last":
                asked.append(loss.detach().get())  # type: ignore[attr-defined]
            if losses == "awaited":
                await asked[-1]
            await asyncio.sleep(0)
        await asyncio.gather(*asked, loss.detach().get())  # type: ignore[attr-defined]
        return time.perf_counter() - begun

    return repetition


def blocking(task: Task, remote: sync.Worker) -> Callable[[], float]:
    """The same in the blocking world."""
    model, x, y = task.start()
    remote.send(model)
    inputs, labels = remote.send(x), remote.send(y)
    optimizer = task.optimizer(model.parameters())

    def repetition() -> float:
        remote.flush()
        begun = time.perf_counter()
        _steps(task, model, inputs, labels, optimizer).get()  # type: ignore[attr-defined]
        return time.perf_counter() - begun

    return repetition


def _plan_of(task: Task, model: Any) -> wsfed.Plan[..., Any]:
    optimizer = task.optimizer(model.parameters())

    @wsfed.plan
    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def plan(task: Task, remote: wsfed.Worker) -> Callable[[], Awaitable[float]]:
    """The step as a plan: one message each."""
    model, x, y = task.start()
    step = _plan_of(task, remote.send(model))
    inputs, labels = remote.send(x), remote.send(y)

    async def repetition() -> float:
        await remote.flush()
        begun = time.perf_counter()
        for _ in range(task.steps):
            loss = step(inputs, labels)
            await asyncio.sleep(0)
        await loss
        return time.perf_counter() - begun

    return repetition


def over_data(task: Task, remote: wsfed.Worker) -> Callable[[], Awaitable[float]]:
    """The step as a plan over a data set of the worker's: one message for all, batches included."""
    model, x, _ = task.start()
    step = _plan_of(task, remote.send(model))

    async def repetition() -> float:
        data = await remote.dataset(task.word)
        await remote.flush()
        begun = time.perf_counter()
        run = data.run(step, epochs=task.steps // EPOCH, batch_size=len(x))
        losses = await run
        assert len(losses) == task.steps // EPOCH * EPOCH
        return (time.perf_counter() - begun) * task.steps / len(losses)

    return repetition


async def grown(remote: wsfed.Worker, memory: Callable[[], float]) -> dict[str, float]:
    """MiB of the worker at first, after 100,000 operations, and after 1,000 plans."""
    start = remote.send(torch.ones(100, 100))

    async def operations(count: int) -> None:
        for number in range(count):
            value = start * 1.5
            if number % 500 == 0:
                await asyncio.sleep(0)
        await value.get()

    async def plans(count: int) -> None:
        for number in range(count):
            step = wsfed.plan(lambda x, by=number + 0.5: (x * by).sum())
            value = step(start)
            await asyncio.sleep(0)
        await value.get()

    await operations(2000)
    await plans(50)
    found = {"worker, at first": memory()}
    await operations(100_000)
    found["worker, 100,000 operations later"] = memory()
    await plans(1000)
    gc.collect()
    await remote.flush()
    found["worker, 1,000 plans later"] = memory()
    return found


def small_ops(count: int, remote: wsfed.Worker) -> Callable[[], Awaitable[float]]:
    """Additions that depend on each other."""
    start = remote.send(torch.ones(16))

    async def repetition() -> float:
        begun = time.perf_counter()
        value: Any = start
        for number in range(count):
            value = value + 1.0
            if number % 500 == 0:
                await asyncio.sleep(0)
        await value
        return time.perf_counter() - begun

    return repetition


async def get_scalar(remote: wsfed.Worker, count: int = 300) -> float:
    """Seconds until the value of one number is here."""
    number = remote.send(torch.tensor(1.0))
    await number
    begun = time.perf_counter()
    for _ in range(count):
        await number
    return (time.perf_counter() - begun) / count


async def bulk(remote: wsfed.Worker, nbytes: int) -> tuple[float, float]:
    """Seconds for a tensor of so many bytes there, and back."""
    tensor = torch.ones(nbytes // 4)
    begun = time.perf_counter()
    sent = remote.send(tensor)
    await remote.flush()
    up = time.perf_counter() - begun
    begun = time.perf_counter()
    await sent
    return up, time.perf_counter() - begun
