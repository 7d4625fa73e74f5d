"""The state of an optimizer is where its parameters are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import wsfed
from tests.pointers.oracle import assert_same_bits, assert_same_state
from tests.pointers.test_training import OPTIMIZERS
from wsfed import Pointer, sync


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    return model, OPTIMIZERS[kind](model.parameters())


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_follows_its_parameters_from_place_to_place(
    kind: str, bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    (local, ours), (model, theirs), x = build(kind), build(kind), torch.randn(5, 3)
    train(local, ours, x)
    train(model, theirs, x)
    for worker in (bob, alice, alice, bob):
        worker.send(model)
        train(local, ours, x)
        train(model, theirs, worker.send(x))
        assert_same_state(model, local)
        for value in tensors_of(theirs):
            assert isinstance(value, Pointer)
            assert value.location is worker
    sync.get(model)
    if tensors_of(theirs):
        sync.get(theirs)
    train(local, ours, x)
    train(model, theirs, x)
    assert_same_state(model, local)
    for one, other in zip(tensors_of(theirs), tensors_of(ours), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_an_optimizer_made_for_a_remote_model_steps(kind: str, bob: sync.VirtualWorker) -> None:
    (local, ours), (model, _), x = build(kind), build(kind), torch.randn(5, 3)
    bob.send(model)
    theirs = OPTIMIZERS[kind](model.parameters())
    train(local, ours, x)
    train(model, theirs, bob.send(x))
    assert_same_state(model, local)


def test_groups_of_parameters_keep_their_options(bob: sync.VirtualWorker) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = build("SGD")
        groups = [
            {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1},
            {"params": model[3].parameters()},
        ]
        return model, torch.optim.SGD(groups, lr=0.1, momentum=0.5, maximize=True)

    (local, ours), (model, theirs), x = start(), start(), torch.randn(5, 3)
    bob.send(model)
    train(local, ours, x)
    train(model, theirs, bob.send(x))
    assert_same_state(model, local)


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_of_rates_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    (local, ours), (model, theirs), x = build("momentum"), build("momentum"), torch.randn(5, 3)
    bob.send(model)
    for each, optimizer, data in ((local, ours, x), (model, theirs, bob.send(x))):
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(3):
            train(each, optimizer, data, steps=1)
            scheduler.step()
    assert_same_state(model, local)


def test_a_rate_that_follows_the_loss_takes_its_value(bob: sync.VirtualWorker) -> None:
    (local, ours), (model, theirs), x = build("SGD"), build("SGD"), torch.randn(5, 3)
    bob.send(model)
    for each, optimizer, data in ((local, ours, x), (model, theirs, bob.send(x))):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for _ in range(4):
            train(each, optimizer, data, steps=1)
            scheduler.step((each(data).detach() ** 2).sum() * 0 + 1)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] < 0.1
    assert_same_state(model, local)


def test_an_average_of_models_is_that_of_torch(bob: sync.VirtualWorker) -> None:
    (local, ours), (model, theirs), x = build("SGD"), build("SGD"), torch.randn(5, 3)
    bob.send(model)
    averages, average_of = [], torch.optim.swa_utils.get_swa_avg_fn()
    for each, optimizer, data in ((local, ours, x), (model, theirs, bob.send(x))):
        average = torch.optim.swa_utils.AveragedModel(each, avg_fn=average_of)
        for _ in range(3):
            train(each, optimizer, data, steps=1)
            average.update_parameters(each)
        averages.append(average)
    assert_same_state(averages[1].module, averages[0].module)


def test_the_state_of_an_optimizer_is_saved_and_loaded(bob: sync.VirtualWorker) -> None:
    model, optimizer = build("Adam")
    bob.send(model)
    x = bob.send(torch.randn(5, 3))
    train(model, optimizer, x)
    saved = sync.get(copy.deepcopy(optimizer.state_dict()))
    twin, other = build("Adam")
    twin.load_state_dict(sync.get(model.state_dict()))
    bob.send(twin)
    other.load_state_dict(saved)
    train(model, optimizer, x)
    train(twin, other, x)
    for one, expected in zip(twin.parameters(), model.parameters(), strict=True):
        assert_same_bits(one, expected.get())


def test_a_step_without_gradients_does_nothing(bob: sync.VirtualWorker) -> None:
    model, optimizer = build("Adam")
    bob.send(model)
    expected = model[0].weight.get()
    optimizer.step()
    assert_same_bits(model[0].weight, expected)


def test_a_closure_gives_its_loss(bob: sync.VirtualWorker) -> None:
    model, optimizer = build("SGD")
    x = bob.send(torch.randn(5, 3))
    bob.send(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) ** 2).sum()
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), Pointer)
    bob.flush()


@pytest.mark.parametrize(
    "kind",
    ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"],
)
def test_optimizers_over_lists_step_as_those_of_torch(kind: str, bob: sync.VirtualWorker) -> None:
    x = torch.randn(5, 3)
    models = []
    for send in (lambda value: value, bob.send):
        model, _ = build("SGD")
        send(model)
        data = send(x)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, foreach=True)
        for _ in range(3):
            optimizer.zero_grad()
            (model(data) ** 2).sum().backward()
            optimizer.step()
        models.append(model)
    assert_same_state(models[1], models[0])


def test_fused_says_what_to_write(bob: sync.VirtualWorker) -> None:
    model, _ = build("SGD")
    bob.send(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    (model(bob.send(torch.randn(5, 3))) ** 2).sum().backward()
    with pytest.raises(wsfed.OpNotAllowed, match="fused=False"):
        optimizer.step()


def test_one_model_on_each_worker_has_its_own_state(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    pairs = [build("Adam") for _ in range(3)]
    x = torch.randn(5, 3)
    for (model, _), worker in zip(pairs, (bob, alice), strict=False):
        worker.send(model)
    for (model, optimizer), data in zip(pairs, (bob.send(x), alice.send(x), x), strict=True):
        train(model, optimizer, data)
    assert_same_state(pairs[0][0], pairs[2][0])
    assert_same_state(pairs[1][0], pairs[2][0])


def lbfgs(model: nn.Module, x: Any) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) ** 2).sum()
        loss.backward()
        return loss

    return optimizer, closure


def test_an_optimizer_that_looks_at_values_steps_in_the_blocking_world(
    bob: sync.VirtualWorker,
) -> None:
    (local, _), (model, _), x = build("SGD"), build("SGD"), torch.randn(5, 3)
    bob.send(model)
    for each, data in ((local, x), (model, bob.send(x))):
        optimizer, closure = lbfgs(each, data)
        optimizer.step(closure)
        optimizer.step(closure)
    assert_same_state(model, local)


async def test_an_optimizer_that_looks_at_values_says_so_in_the_async_world(
    carol: wsfed.VirtualWorker,
) -> None:
    model, _ = build("SGD")
    optimizer, closure = lbfgs(carol.send(model), carol.send(torch.randn(5, 3)))
    with pytest.raises(wsfed.ValueNeeded, match=r"await pointer\.get\(\)"):
        optimizer.step(closure)
