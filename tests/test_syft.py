"""PySyft's tutorial runs as it stands, and torch is left as it was."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

import wsfed
import wsfed.syft as sy
from wsfed import Pointer


@pytest.fixture
def hook() -> Iterator[sy.TorchHook]:
    with sy.TorchHook(torch) as hook:
        yield hook


@pytest.fixture
def workers(hook: sy.TorchHook) -> Iterator[tuple[sy.VirtualWorker, sy.VirtualWorker]]:
    with sy.VirtualWorker(hook, id="bob") as bob, sy.VirtualWorker(hook, id="alice") as alice:
        yield bob, alice


def tutorial(bob: Any, alice: Any) -> tuple[list[float], nn.Module]:
    """The cells of "Federated Learning: Introduction", as they stand."""
    # A Toy Dataset
    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]], requires_grad=True)
    target = torch.tensor([[0], [0], [1], [1.0]], requires_grad=True)

    # get pointers to training data on each worker by
    # sending some training data to bob and alice
    data_bob = data[0:2].send(bob)
    target_bob = target[0:2].send(bob)
    data_alice = data[2:].send(alice)
    target_alice = target[2:].send(alice)
    datasets = [(data_bob, target_bob), (data_alice, target_alice)]

    # A Toy Model
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    opt = optim.SGD(params=model.parameters(), lr=0.1)
    losses = []

    def train() -> None:
        # Training Logic
        for _ in range(10):
            # NEW) iterate through each worker's dataset
            for data, target in datasets:
                # NEW) send model to correct worker
                model.send(data.location)
                # 1) erase previous gradients (if they exist)
                opt.zero_grad()
                # 2) make a prediction
                pred = model(data)
                # 3) calculate how much we missed
                loss = ((pred - target) ** 2).sum()
                # 4) figure out which weights caused us to miss
                loss.backward()
                # 5) change those weights
                opt.step()
                # NEW) get model (with gradients)
                model.get()
                # 6) print our progress
                print(loss.get())
                losses.append(loss.get().item())

    train()
    return losses, model


def plain() -> tuple[list[float], nn.Module]:
    """The same in torch alone."""
    data = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]], requires_grad=True)
    target = torch.tensor([[0], [0], [1], [1.0]], requires_grad=True)
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    opt = optim.SGD(params=model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        for rows in (slice(0, 2), slice(2, 4)):
            opt.zero_grad()
            loss = ((model(data[rows]) - target[rows]) ** 2).sum()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    return losses, model


def test_the_tutorial_runs_as_it_stands(
    workers: tuple[sy.VirtualWorker, sy.VirtualWorker], capsys: pytest.CaptureFixture[str]
) -> None:
    losses, model = tutorial(*workers)
    expected, local = plain()
    assert losses == expected
    assert torch.equal(model.weight, local.weight)
    assert torch.equal(model.bias, local.bias)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 20
    assert all(line.startswith("tensor(") for line in printed)


@pytest.fixture
async def urls() -> AsyncIterator[list[str]]:
    bob, alice = wsfed.Node("bob"), wsfed.Node("alice")
    async with bob, alice, bob.listen() as one, alice.listen() as other:
        yield [one, other]


async def test_the_tutorial_runs_on_workers_behind_sockets(
    urls: list[str], hook: sy.TorchHook
) -> None:
    def cells() -> list[float]:
        host, port = urls[0].removeprefix("ws://").rsplit(":", 1)
        bob = sy.WebsocketClientWorker(hook, host, int(port), id="bob")
        alice = sy.WebsocketClientWorker(hook, url=urls[1])
        with bob, alice:
            assert (bob.id, alice.id) == ("bob", "alice")
            return tutorial(bob, alice)[0]

    assert await asyncio.to_thread(cells) == plain()[0]


def test_tensors_have_the_verbs_of_the_tutorials(
    workers: tuple[sy.VirtualWorker, sy.VirtualWorker],
) -> None:
    bob, alice = workers
    x = torch.tensor([1.0, 2.0, 3.0]).send(bob)
    assert isinstance(x, Pointer)
    assert x.location is bob
    y = x.move(alice)
    assert y.location is alice
    assert torch.equal((y + y).get(), torch.tensor([2.0, 4.0, 6.0]))
    assert torch.equal(x.copy().get(), x.get())
    x.tag("#numbers", "#small").describe("three numbers")
    (found,) = bob.search("#numbers")
    assert torch.equal(found.get(), x.get())
    assert alice.search("#numbers") == []


def test_a_worker_shows_and_forgets_what_it_holds(
    hook: sy.TorchHook, workers: tuple[sy.VirtualWorker, sy.VirtualWorker]
) -> None:
    bob, alice = workers
    assert bob._objects == {}
    x = torch.tensor([1, 2, 3]).send(bob)
    assert x.owner == hook.local_worker.id == "me"
    assert list(bob._objects) == [x.id_at_location]
    assert torch.equal(bob._objects[x.id_at_location], torch.tensor([1, 2, 3]))
    doubled = x + x
    assert len(bob._objects) == 2
    del doubled
    assert len(bob._objects) == 1
    assert alice._objects == {}
    assert bob.clear_objects() is bob
    assert bob._objects == {}
    with pytest.raises(wsfed.NotFound):
        x.get()


def test_one_tensor_goes_to_one_worker(
    workers: tuple[sy.VirtualWorker, sy.VirtualWorker],
) -> None:
    with pytest.raises(TypeError, match="send takes one worker"):
        torch.ones(1).send(*workers)


def test_a_pointer_can_be_sent_on(
    workers: tuple[sy.VirtualWorker, sy.VirtualWorker],
) -> None:
    bob, alice = workers
    x = torch.tensor([1.0]).send(bob)
    assert x.send(bob) is x
    assert x.send(alice).location is alice


def test_modules_have_the_verbs_of_the_tutorials(
    workers: tuple[sy.VirtualWorker, sy.VirtualWorker],
) -> None:
    bob, alice = workers
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    assert model.location is None
    assert model.send(bob) is model
    assert model.location is bob
    twin = model.copy()
    assert twin.location is bob
    assert model.move(alice) is model
    assert model.location is alice
    assert model.get() is model
    assert model.location is None
    assert torch.equal(model.weight, before)
    assert torch.equal(twin.get().weight, before)


def test_gradients_come_home_with_a_module(
    workers: tuple[sy.VirtualWorker, sy.VirtualWorker],
) -> None:
    bob, _ = workers
    model = nn.Linear(2, 1)
    model.send(bob)
    model(torch.ones(1, 2).send(bob)).sum().backward()
    assert torch.equal(model.get().weight.grad, torch.ones(1, 2))
    model.send(bob)
    assert model.get(grads=False).weight.grad is None


def test_what_is_local_is_not_got(hook: sy.TorchHook) -> None:
    with pytest.raises(wsfed.PointerError, match="here already"):
        torch.ones(1).get()
    with pytest.raises(TypeError, match="send takes a worker, not str"):
        torch.ones(1).send("bob")
    with pytest.raises(TypeError, match="the first argument is the hook"):
        sy.VirtualWorker("bob", id="bob")
    with pytest.raises(TypeError, match="the first argument is the hook"):
        sy.WebsocketClientWorker("127.0.0.1")


# --- what the hook does to torch -----------------------------------------------------------------


def state_of_torch() -> list[dict[str, Any]]:
    from torch.optim import optimizer

    return [
        dict(vars(torch)),
        dict(vars(torch.Tensor)),
        dict(vars(nn.Module)),
        dict(vars(nn.Parameter)),
        dict(vars(optim.Optimizer)),
        dict(optimizer._global_optimizer_pre_hooks),
        dict(optimizer._global_optimizer_post_hooks),
    ]


def test_a_hook_adds_what_it_says_and_takes_it_away() -> None:
    before = state_of_torch()
    hook = sy.TorchHook(torch)
    added = {
        (owner, name)
        for owner, was in zip((torch.Tensor, nn.Module), before[1:3], strict=True)
        for name in vars(owner).keys() - was.keys()
    }
    assert added == set(sy.ADDED)
    hook.unhook()
    assert state_of_torch() == before
    hook.unhook()
    assert state_of_torch() == before


def test_two_hooks_are_taken_away_one_by_one() -> None:
    before = state_of_torch()
    with sy.TorchHook(torch) as one:
        with sy.TorchHook(torch):
            assert hasattr(torch.Tensor, "send")
        assert hasattr(torch.Tensor, "send")
        one.unhook()
        assert state_of_torch() == before
    assert state_of_torch() == before


def test_a_hook_does_not_replace_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "send", print, raising=False)
    with pytest.raises(AttributeError, match="Tensor has a send already"):
        sy.TorchHook(torch)
    assert not hasattr(nn.Module, "send")
    assert torch.Tensor.send is print


def test_workers_leave_torch_as_it_was() -> None:
    before = state_of_torch()
    with sy.TorchHook(torch) as hook, sy.VirtualWorker(hook, id="bob") as bob:
        model = nn.Linear(2, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        model.send(bob)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        model.get()
    assert state_of_torch() == before


IMPORTS = """
import torch, torch.overrides
from torch import nn, optim
from torch.optim import optimizer

def state():
    return [dict(vars(each)) for each in (
        torch, torch.Tensor, nn.Module, nn.Parameter, nn.functional, nn.init, optim,
        optim.Optimizer, torch.autograd, torch.overrides, torch.utils)] + [
        dict(optimizer._global_optimizer_pre_hooks), dict(optimizer._global_optimizer_post_hooks),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.get_num_threads(), torch.get_rng_state().tolist()]

before = state()
import wsfed
{imports}
after = state()
for old, new in zip(before, after, strict=True):
    if isinstance(old, dict):
        assert {{name: id(value) for name, value in old.items()}}.items() <= {{
            name: id(value) for name, value in new.items()}}.items()
        # torch imports parts of its own on demand.
        added = [n for n in new.keys() - old.keys() if type(new[n]).__name__ != "module"]
        assert not added, added
    else:
        assert old == new
"""


@pytest.mark.parametrize(
    "imports",
    [
        "",
        "import wsfed.syft, wsfed.sync, wsfed.client.worker, wsfed.node",
        "[getattr(wsfed, name) for name in wsfed.__all__]",
    ],
    ids=["the package", "its modules", "its names"],
)
def test_importing_changes_nothing_in_torch(imports: str) -> None:
    program = IMPORTS.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_load_torch() -> None:
    program = "import sys, wsfed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
