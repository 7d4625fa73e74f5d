"""torch's own optimizers step where the parameters are, and their state follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wsfed

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
}
DATA = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]])
TARGET = torch.tensor([[0], [0], [1], [1.0]])


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return model, OPTIMIZERS[kind](model.parameters())


def locally(kind: str) -> tuple[list[float], nn.Module]:
    model, optimizer = build(kind)
    losses = []
    for _ in range(10):
        for rows in (slice(0, 2), slice(2, 4)):
            optimizer.zero_grad()
            loss = ((model(DATA[rows]) - TARGET[rows]) ** 2).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("kind", OPTIMIZERS)
async def test_twenty_steps_on_two_workers_are_those_of_torch(kind: str) -> None:
    expected, local = locally(kind)
    losses = []
    async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
        sets = [
            (worker.send(DATA[rows]), worker.send(TARGET[rows]))
            for worker, rows in ((bob, slice(0, 2)), (alice, slice(2, 4)))
        ]
        model, optimizer = build(kind)
        for _ in range(10):
            for x, y in sets:
                x.location.send(model)
                optimizer.zero_grad()
                loss = ((model(x) - y) ** 2).sum()
                loss.backward()
                optimizer.step()
                await wsfed.get(model)
                losses.append((await loss.get()).item())
        assert losses == expected
        for a, b in zip(local.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam"])
async def test_a_model_that_never_comes_home_between_is_trained_the_same(kind: str) -> None:
    expected, _ = locally(kind)
    async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
        sets = [
            (worker.send(DATA[rows]), worker.send(TARGET[rows]))
            for worker, rows in ((bob, slice(0, 2)), (alice, slice(2, 4)))
        ]
        model, optimizer = build(kind)
        asked = []
        for _ in range(10):
            for x, y in sets:
                wsfed.move(model, x.location)
                optimizer.zero_grad()
                loss = ((model(x) - y) ** 2).sum()
                loss.backward()
                optimizer.step()
                asked.append(loss.get())
        assert [(await each).item() for each in asked] == expected


async def test_schedulers_clipping_and_accumulation_are_those_of_torch() -> None:
    x, y = torch.randn(6, 2), torch.randint(0, 3, (6,))

    def train(model: nn.Module, x: Any, y: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            for part in (slice(0, 3), slice(3, 6)):
                F.cross_entropy(model(x[part]), y[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()

    torch.manual_seed(0)
    here = nn.Linear(2, 3)
    there = wsfed.copy(here)
    train(here, x, y)
    async with wsfed.VirtualWorker("bob") as bob:
        train(bob.send(there), bob.send(x), bob.send(y))
        await wsfed.get(there)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


async def test_an_optimizer_whose_model_came_home_asks_for_its_state() -> None:
    model, optimizer = build("Adam")
    async with wsfed.VirtualWorker("bob") as bob:
        bob.send(model)
        model(bob.send(DATA)).sum().backward()
        optimizer.step()
        await wsfed.get(model)
        with pytest.raises(wsfed.PointerError, match=r"await wsfed\.get\(optimizer\)"):
            optimizer.step()
        await wsfed.get(optimizer)
        optimizer.step()


async def test_the_hook_for_optimizers_is_there_while_there_is_a_worker() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    before = len(hooks)
    async with wsfed.VirtualWorker("bob"):
        async with wsfed.VirtualWorker("alice"):
            assert len(hooks) == before + 1
        assert len(hooks) == before + 1
    assert len(hooks) == before
