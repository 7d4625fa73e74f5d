"""Gradients without ``.grad``: torch.autograd.grad, of any order, and what is built on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import functional

import wsfed
from tests.pointers.oracle import assert_same_bits
from wsfed import sync

X = torch.tensor([0.5, -1.5, 2.0])
Y = torch.tensor([1.0, 2.0, -0.25])


def penalty(x: Any, y: Any) -> Any:
    """A gradient penalty (Gulrajani et al. 2017)."""
    (slope,) = torch.autograd.grad((x * y).tanh().sum(), x, create_graph=True)
    ((slope.norm() - 1) ** 2).backward()
    return x.grad, y.grad


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "one": lambda x, y: torch.autograd.grad((x**2).sum(), x),
    "two": lambda x, y: torch.autograd.grad((x * y).sum(), (x, y)),
    "the same twice": lambda x, y: torch.autograd.grad((x**2).sum(), (x, x)),
    "by name": lambda x, y: torch.autograd.grad((x * y).sum(), {"x": x, "y": y})["y"],
    "of a result": lambda x, y: (lambda h: torch.autograd.grad((h**2).sum(), h))(x * y),
    "with gradients": lambda x, y: torch.autograd.grad(x * y, x, grad_outputs=torch.arange(3.0)),
    "second order": lambda x, y: torch.autograd.grad(
        torch.autograd.grad((x**3 * y).sum(), x, create_graph=True)[0].sum(), (x, y)
    ),
    "kept graph": lambda x, y: (
        lambda loss: [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    )((x**2).sum()),
    "unused": lambda x, y: torch.autograd.grad((x**2).sum(), (x, y), allow_unused=True),
    "unused is zero": lambda x, y: torch.autograd.grad(
        (x**2).sum(), (x, y), materialize_grads=True
    ),
    "penalty": penalty,
    "jacobian": lambda x, y: functional.jacobian(lambda a: a**2 * y.detach(), x.detach()),
    "hessian": lambda x, y: functional.hessian(lambda a: (a**3).sum(), x.detach()),
    "vjp": lambda x, y: functional.vjp(torch.exp, x.detach(), torch.ones(3)),
    "jvp": lambda x, y: functional.jvp(torch.exp, x.detach(), torch.ones(3)),
    "hvp": lambda x, y: functional.hvp(lambda a: (a**3).sum(), x.detach(), torch.ones(3)),
    "vhp": lambda x, y: functional.vhp(lambda a: (a**3).sum(), x.detach(), torch.ones(3)),
}


def leaves(worker: Any = None) -> list[Any]:
    made = [each.clone().requires_grad_() for each in (X, Y)]
    return made if worker is None else [worker.send(each) for each in made]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    expected, got = CALLS[name](*leaves()), CALLS[name](*leaves(bob))
    ours = torch.utils._pytree.tree_leaves(expected)
    theirs = torch.utils._pytree.tree_leaves(got)
    assert len(ours) == len(theirs)
    for one, other in zip(theirs, ours, strict=True):
        if other is None:
            assert one is None
        else:
            assert_same_bits(one.detach(), other)


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "not used": lambda x, y: torch.autograd.grad((x**2).sum(), y),
    "one of two not used": lambda x, y: torch.autograd.grad((x**2).sum(), (x, y)),
    "requires no grad": lambda x, y: torch.autograd.grad((x**2).sum(), y.detach()),
    "does not require grad": lambda x, y: torch.autograd.grad(x.detach().sum(), x),
    "no scalar": lambda x, y: torch.autograd.grad(x * y, x),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_torchs_own_error(name: str, bob: sync.VirtualWorker) -> None:
    with pytest.raises(RuntimeError) as local:
        WRONG[name](*leaves())
    with pytest.raises(RuntimeError) as remote:
        WRONG[name](*leaves(bob))
    assert str(remote.value) == str(local.value)


def test_a_graph_that_was_freed_is_torchs_own_error_at_its_line(bob: sync.VirtualWorker) -> None:
    x, _ = leaves(bob)
    loss = (x**2).sum()
    torch.autograd.grad(loss, x)
    (again,) = torch.autograd.grad(loss, x)
    with pytest.raises(
        wsfed.RemoteError, match="backward through the graph a second time"
    ) as caught:
        again.get()
    assert caught.value.site.startswith(__file__)


def test_gradients_of_two_workers_do_not_meet(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    (x, _), (y, _) = leaves(bob), leaves(alice)
    with pytest.raises(wsfed.NotCollocated):
        torch.autograd.grad((x**2).sum(), y)


def test_batched_gradients_are_refused_by_name(bob: sync.VirtualWorker) -> None:
    x, y = leaves(bob)
    with pytest.raises(wsfed.OpNotAllowed, match="is_grads_batched"):
        torch.autograd.grad(x * y, x, torch.eye(3), is_grads_batched=True)


def test_an_anomaly_is_found_and_named_as_by_torch(bob: sync.VirtualWorker) -> None:
    x, _ = leaves(bob)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that it is slow
        with torch.autograd.detect_anomaly():
            torch.sqrt(x * 0 - 1).sum().backward()
    with pytest.raises(wsfed.RemoteError, match="'SqrtBackward0' returned nan values in its 0th"):
        bob.flush()
    y, _ = leaves(bob)
    torch.sqrt(y * 0 - 1).sum().backward()  # without looking
    assert bool(y.grad.get().isnan().all())


async def test_nothing_waits(carol: wsfed.VirtualWorker) -> None:
    x, y = leaves(carol)
    (slope,) = torch.autograd.grad((x * y).sum(), x)
    assert torch.equal(await slope, Y)


def test_what_a_penalty_does_not_depend_on_has_no_gradient(bob: sync.VirtualWorker) -> None:
    torch.manual_seed(0)
    local = nn.Linear(3, 1)
    remote = copy.deepcopy(local)
    bob.send(remote)
    for model, x in ((local, X.clone()), (remote, bob.send(X))):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert [p.grad is None for p in model.parameters()] == [False, True]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    sync.get(remote)
    assert torch.equal(remote.weight, local.weight)
