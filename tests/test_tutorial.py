"""The tutorial over two worker processes: the losses are those of torch, and its cells run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn, optim

import wsfed
import wsfed.syft as sy
from wsfed.testing import worker_process

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda params: optim.SGD(params=params, lr=0.1),
    "momentum": lambda params: optim.SGD(params=params, lr=0.1, momentum=0.9),
    "Adam": lambda params: optim.Adam(params=params, lr=0.1),
}

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with ExitStack() as stack:
        started = [stack.enter_context(worker_process("--id", id)) for id in ("bob", "alice")]
        yield [worker["url"] for worker in started]


def plain_torch(kind: str) -> list[float]:
    torch.manual_seed(0)
    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]], requires_grad=True)
    target = torch.tensor([[0], [0], [1], [1.0]], requires_grad=True)
    model = nn.Linear(2, 1)
    opt = OPTIMIZERS[kind](model.parameters())
    losses = []
    for _ in range(10):
        for rows in (slice(0, 2), slice(2, 4)):
            opt.zero_grad()
            loss = ((model(data[rows]) - target[rows]) ** 2).sum()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
async def test_twenty_losses_are_bit_for_bit_those_of_torch(urls: list[str], kind: str) -> None:
    torch.manual_seed(0)
    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]])
    target = torch.tensor([[0], [0], [1], [1.0]])
    async with wsfed.connect(urls[0]) as bob, wsfed.connect(urls[1]) as alice:
        datasets = [
            (bob.send(data[:2]), bob.send(target[:2])),
            (alice.send(data[2:]), alice.send(target[2:])),
        ]
        model = nn.Linear(2, 1)
        opt = OPTIMIZERS[kind](model.parameters())
        losses = []
        for _ in range(10):
            for x, y in datasets:
                x.location.send(model)
                opt.zero_grad()
                loss = ((model(x) - y) ** 2).sum()
                loss.backward()
                opt.step()
                await wsfed.get(model)
                losses.append((await loss.get()).item())
    assert losses == plain_torch(kind)


def cells(hook: Any, bob: Any, alice: Any, kind: str) -> list[float]:
    """The tutorial's cells; what they print is what they return."""
    torch.manual_seed(0)
    # A toy dataset
    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]], requires_grad=True)
    target = torch.tensor([[0], [0], [1], [1.0]], requires_grad=True)

    # get pointers to training data on each worker by sending some data to bob and alice
    data_bob = data[0:2].send(bob)  # type: ignore[attr-defined]
    target_bob = target[0:2].send(bob)  # type: ignore[attr-defined]
    data_alice = data[2:].send(alice)  # type: ignore[attr-defined]
    target_alice = target[2:].send(alice)  # type: ignore[attr-defined]
    datasets = [(data_bob, target_bob), (data_alice, target_alice)]

    model: Any = nn.Linear(2, 1)
    opt = OPTIMIZERS[kind](model.parameters())
    losses = []
    for _ in range(10):
        for data, target in datasets:
            model.send(data.location)
            opt.zero_grad()
            pred = model(data)
            loss = ((pred - target) ** 2).sum()
            loss.backward()
            opt.step()
            model.get()
            losses.append(loss.get().item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_cells_run_as_they_stand_on_virtual_workers(kind: str) -> None:
    with (
        sy.TorchHook(torch) as hook,
        sy.VirtualWorker(hook, id="bob") as bob,
        sy.VirtualWorker(hook, id="alice") as alice,
    ):
        assert cells(hook, bob, alice, kind) == plain_torch(kind)


def test_the_cells_run_as_they_stand_on_worker_processes(urls: list[str]) -> None:
    ports = [urlsplit(url).port for url in urls]
    with (
        sy.TorchHook(torch) as hook,
        sy.WebsocketClientWorker(hook, host="127.0.0.1", port=ports[0], id="bob") as bob,
        sy.WebsocketClientWorker(hook, host="127.0.0.1", port=ports[1], id="alice") as alice,
    ):
        assert cells(hook, bob, alice, "SGD") == plain_torch("SGD")
