"""Autograd runs on the worker, and the client knows what it has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import wsfed
from tests.pointers.oracle import assert_same_bits, assert_same_grad
from wsfed import sync


@pytest.fixture
def pair(bob: sync.VirtualWorker) -> tuple[torch.Tensor, Any]:
    """A leaf here, and the same one there."""
    local = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    return local, bob.send(local.detach().clone().requires_grad_())


def test_a_sent_leaf_is_a_leaf(pair: tuple[torch.Tensor, Any]) -> None:
    _, remote = pair
    assert remote.requires_grad
    assert remote.is_leaf
    assert remote.grad is None
    assert remote.grad_fn is None


def test_a_result_is_no_leaf(pair: tuple[torch.Tensor, Any]) -> None:
    for x in pair:
        y = x * 2
        assert y.requires_grad
        assert not y.is_leaf
        assert y.grad_fn is not None
        assert not (x > 1).requires_grad
        assert not x.argmax().requires_grad


def test_what_came_home_is_a_leaf_if_it_was_one(pair: tuple[torch.Tensor, Any]) -> None:
    _, remote = pair
    assert remote.get().requires_grad
    assert not (remote * 2).get().requires_grad


def test_the_gradient_is_there_after_backward(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        assert x.grad is None
        (x**2).sum().backward()
    assert_same_grad(remote, local)
    assert remote.grad is remote.grad
    assert not remote.grad.requires_grad


def test_gradients_accumulate_into_the_same_tensor(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        (x**2).sum().backward()
    kept = remote.grad
    for x in pair:
        for _ in range(3):
            (x**3).sum().backward()
    assert remote.grad is kept
    assert_same_bits(kept, local.grad)


def test_retain_graph_allows_another_backward(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        y = (x**2).sum()
        y.backward(retain_graph=True)
        y.backward()
    assert_same_grad(remote, local)


def test_backward_twice_is_torchs_own_error_at_its_line(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    y = (x**2).sum()
    y.backward()
    y.backward()
    line = test_backward_twice_is_torchs_own_error_at_its_line.__code__.co_firstlineno + 4
    with pytest.raises(wsfed.RemoteError, match="backward through the graph a second time") as e:
        bob.flush()
    assert e.value.type == "RuntimeError"
    assert e.value.op == "backward"
    assert e.value.site == f"{__file__}:{line}"


@pytest.mark.parametrize("where", ["local", "remote"])
def test_backward_takes_a_gradient(
    where: str, pair: tuple[torch.Tensor, Any], bob: sync.VirtualWorker
) -> None:
    local, remote = pair
    gradient = torch.tensor([1.0, 0.5, -1.0])
    (local**2).backward(gradient)
    (remote**2).backward(gradient=gradient if where == "local" else bob.send(gradient))
    assert_same_grad(remote, local)


def test_a_gradient_of_another_shape_for_backward_is_torchs_own_error(
    pair: tuple[torch.Tensor, Any],
) -> None:
    texts = []
    for x in pair:
        with pytest.raises(RuntimeError, match="Mismatch in shape") as caught:
            (x**2).backward(torch.ones(2))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_gradient_on_another_worker_is_not_collocated(
    pair: tuple[torch.Tensor, Any], alice: sync.VirtualWorker
) -> None:
    _, remote = pair
    with pytest.raises(wsfed.NotCollocated, match="'bob' and 'alice'"):
        (remote**2).backward(alice.send(torch.ones(3)))


def test_backward_takes_inputs(bob: sync.VirtualWorker) -> None:
    a, b = (bob.send(torch.ones(2, requires_grad=True)) for _ in range(2))
    (a * b * 3).sum().backward(inputs=[a])
    assert_same_bits(a.grad, torch.full((2,), 3.0))
    assert b.grad is None
    (a * b * 3).sum().backward(inputs=b)
    assert_same_bits(b.grad, torch.full((2,), 3.0))
    assert_same_bits(a.grad, torch.full((2,), 3.0))


def test_backward_of_several_roots(bob: sync.VirtualWorker) -> None:
    local = torch.ones(2, requires_grad=True)
    remote = bob.send(local)
    for x in (local, remote):
        torch.autograd.backward([(x * 2).sum(), (x**3).sum()])
        torch.autograd.backward([x * 2, x.sum()], [torch.ones(2), None])
        torch.autograd.backward((x * 5).sum(), inputs=x)
    assert_same_grad(remote, local)


@pytest.mark.parametrize(
    "start",
    [lambda x: x.detach().sum(), lambda x: x * 2, lambda x: (x > 1).sum()],
    ids=["no graph", "no scalar", "no gradient"],
)
def test_a_backward_that_cannot_be_is_torchs_own_error(
    start: Callable[[Any], Any], pair: tuple[torch.Tensor, Any], bob: sync.VirtualWorker
) -> None:
    local, remote = pair
    with pytest.raises(RuntimeError) as here:
        start(local).backward()
    with pytest.raises(RuntimeError) as there:
        start(remote).backward()
    assert str(there.value) == str(here.value)
    bob.flush()


def test_a_kept_gradient_of_a_result_is_there(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    results = []
    for x in pair:
        y = x * 2
        y.retain_grad()
        (y**2).sum().backward()
        results.append(y)
    assert_same_grad(results[1], results[0])
    assert_same_grad(remote, local)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_does_what_torch_does(to_none: bool, bob: sync.VirtualWorker) -> None:
    torch.manual_seed(0)
    local, x = nn.Linear(3, 1), torch.ones(2, 3)
    remote = bob.send(wsfed.copy(local))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (local, remote)]
    for model, optimizer in zip((local, remote), optimizers, strict=True):
        model(x).sum().backward()
        optimizer.zero_grad(set_to_none=to_none)
    assert (remote.weight.grad is None) == to_none
    assert_same_grad(remote.weight, local.weight)
    for model in (local, remote):
        model.zero_grad(set_to_none=to_none)
        model(x).sum().backward()
    assert_same_grad(remote.weight, local.weight)


def test_setting_grad_to_none_forgets_it(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        (x**2).sum().backward()
        old = x.grad
        x.grad = None
        assert x.grad is None
        (x**3).sum().backward()
        assert x.grad is not old
    assert_same_grad(remote, local)


def test_a_gradient_can_be_assigned(
    pair: tuple[torch.Tensor, Any], bob: sync.VirtualWorker
) -> None:
    _, remote = pair
    remote.grad = torch.ones(3)
    assert_same_bits(remote.grad, torch.ones(3))
    mine = bob.send(torch.full((3,), 2.0))
    remote.grad = mine
    assert remote.grad is mine
    (remote * 3).sum().backward()
    assert_same_bits(mine, torch.full((3,), 5.0))


def test_a_gradient_of_another_shape_or_place_is_refused(
    pair: tuple[torch.Tensor, Any], alice: sync.VirtualWorker
) -> None:
    _, remote = pair
    with pytest.raises(RuntimeError, match="assigned grad has data of a different size"):
        remote.grad = torch.ones(4)
    with pytest.raises(wsfed.PointerError, match="on the worker of its tensor"):
        remote.grad = alice.send(torch.ones(3))
    assert remote.grad is None


def test_a_gradient_is_written_in_place(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        (x**2).sum().backward()
        x.grad.mul_(0.5).add_(1)
        x.grad += 1
    assert_same_grad(remote, local)


def test_clipping_is_that_of_torch(bob: sync.VirtualWorker) -> None:
    torch.manual_seed(0)
    local = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    remote, x = bob.send(wsfed.copy(local)), torch.ones(2, 3)
    norms = []
    for model in (local, remote):
        model(x).sum().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
    assert_same_bits(norms[1], norms[0])
    for one, other in zip(remote.parameters(), local.parameters(), strict=True):
        assert_same_grad(one, other)


# --- who depends on whom -------------------------------------------------------------------------


def test_detach_and_data_leave_the_graph(pair: tuple[torch.Tensor, Any]) -> None:
    for x in pair:
        assert not x.detach().requires_grad
        assert not x.data.requires_grad
        assert x.detach().is_leaf
        (x.detach() * x).sum().backward()
    local, remote = pair
    assert_same_grad(remote, local)


def test_data_shares_its_memory(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        x.data.add_(1)
        x.detach()[0] = 9.0
        x.data[1:].mul_(2)
        assert x.is_leaf
    assert_same_bits(remote, local)


def test_data_can_be_assigned(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    x.data = bob.send(torch.zeros(3))
    assert x.requires_grad
    assert_same_bits(x, torch.zeros(3))


def test_requires_grad_can_be_set(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    assert x.requires_grad_() is x
    assert x.requires_grad
    (x * 2).sum().backward()
    assert_same_bits(x.grad, torch.full((3,), 2.0))
    x.requires_grad_(False)
    assert not x.requires_grad
    assert not (x * 2).requires_grad
    x.requires_grad = True
    assert (x * 2).requires_grad


def test_requires_grad_of_what_is_no_leaf_is_torchs_own_error(
    pair: tuple[torch.Tensor, Any],
) -> None:
    for x in pair:
        with pytest.raises(RuntimeError, match="only change requires_grad flags of leaf"):
            (x * 2).requires_grad_(False)
        with pytest.raises(RuntimeError, match="floating point"):
            x.detach().long().requires_grad_()


def test_detach_in_place_leaves_the_graph(pair: tuple[torch.Tensor, Any]) -> None:
    for x in pair:
        y = x * 2
        y.detach_()
        assert not y.requires_grad
        assert y.is_leaf
        (y * x).sum().backward()
    assert_same_grad(pair[1], pair[0])


def test_a_gradient_stops_where_it_is_not_wanted(bob: sync.VirtualWorker) -> None:
    model = bob.send(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    model[0].requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    bob.flush()


def test_a_leaf_that_nothing_depends_on_has_no_gradient(bob: sync.VirtualWorker) -> None:
    a, b = (bob.send(torch.ones(2, requires_grad=True)) for _ in range(2))
    (a * 2).sum().backward()
    assert a.grad is not None
    assert b.grad is None


VIEWS: dict[str, Callable[[Any], Any]] = {
    "a row": lambda x: x[0],
    "a slice": lambda x: x[:, 1:],
    "a view": lambda x: x.view(-1),
    "a transposed one": lambda x: x.t(),
    "a view of a view": lambda x: x.view(-1)[2:][1:],
    "narrow": lambda x: x.narrow(0, 0, 1),
    "diagonal": lambda x: x.diagonal(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_writing_through_a_view_makes_its_base_depend(name: str, bob: sync.VirtualWorker) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    remote_weight = bob.send(weight)
    base, remote_base = torch.ones(2, 3), bob.send(torch.ones(2, 3))
    for x, w in ((base, weight), (remote_base, remote_weight)):
        VIEWS[name](x).mul_(w)
        assert x.requires_grad
        assert not x.is_leaf
        (x**2).sum().backward()
    assert_same_bits(remote_base, base)
    assert_same_grad(remote_weight, weight)


def test_assignment_makes_what_is_written_to_depend(bob: sync.VirtualWorker) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    remote_weight = bob.send(weight)
    for x, w in ((torch.ones(2, 3), weight), (bob.send(torch.ones(2, 3)), remote_weight)):
        x[0, 1:] = w * 3
        x[1] += w
        assert x.requires_grad
        (x**2).sum().backward()
    assert_same_grad(remote_weight, weight)


def test_writing_to_a_base_changes_its_views(bob: sync.VirtualWorker) -> None:
    base = bob.send(torch.zeros(4))
    view = base[1:3]
    base.fill_(5.0)
    assert_same_bits(view * 1, torch.full((2,), 5.0))


@pytest.mark.parametrize(
    "same",
    [
        lambda x: x[:2].contiguous(),
        lambda x: x.view(-1).to(torch.float32),
        lambda x: x[1:].float(),
        lambda x: x.view(3).cpu(),
        lambda x: x[:2].to("cpu"),
        lambda x: x.view(-1).type_as(x),
        lambda x: torch.atleast_1d(x.view(-1)),
    ],
    ids=range(7),
)
def test_what_gives_its_own_argument_writes_nothing(
    same: Callable[[Any], Any], pair: tuple[torch.Tensor, Any]
) -> None:
    local, remote = pair
    for x in pair:
        (same(x) ** 2).sum().backward()
        assert x.is_leaf
    assert_same_grad(remote, local)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writing_without_grad_leaves_a_leaf_a_leaf(
    mode: Callable[[], Any], pair: tuple[torch.Tensor, Any]
) -> None:
    local, remote = pair
    for x in pair:
        view = x[:2]
        with mode():
            view.mul_(2)
            x[2:] = 7.0
        assert x.is_leaf
        (x**2).sum().backward()
    assert_same_bits(remote, local)
    assert_same_grad(remote, local)


def test_a_gradient_of_a_gradient(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        with pytest.warns(UserWarning, match="create_graph") if x is local else _quietly():
            (x**3).sum().backward(create_graph=True)
    assert_same_bits(remote.grad, local.grad.detach())


def _quietly() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_a_local_input_for_backward_is_refused(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    with pytest.raises(wsfed.PointerError, match="no part of a graph on a worker"):
        (remote**2).sum().backward(inputs=[local])


async def test_nothing_waits_for_a_backward(carol: wsfed.VirtualWorker) -> None:
    x = carol.send(torch.ones(3, requires_grad=True))
    for _ in range(3):
        (x**2).sum().backward()
        with torch.no_grad():
            x -= 0.1 * x.grad
        x.grad = None
    local = torch.ones(3, requires_grad=True)
    for _ in range(3):
        (local**2).sum().backward()
        with torch.no_grad():
            local -= 0.1 * local.grad
        local.grad = None
    assert_same_bits(await x, local)


@pytest.mark.parametrize("retains", [False, True])
def test_a_result_named_as_input_gets_its_gradient(
    retains: bool, pair: tuple[torch.Tensor, Any]
) -> None:
    results = []
    for x in pair:
        y = x * 2
        side = x * 3
        if retains:
            side.retain_grad()
        (y**2 + side).sum().backward(inputs=[y])
        assert x.grad is None
        assert not retains or side.grad is None
        results.append(y)
    assert_same_grad(results[1], results[0])


def test_a_kept_gradient_on_the_way_to_an_input_is_there(pair: tuple[torch.Tensor, Any]) -> None:
    results = []
    for x in pair:
        y = x * 2
        y.retain_grad()
        (y**2).sum().backward(inputs=[x])
        results.append(y)
    assert_same_grad(results[1], results[0])


class Doubled(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * 2


def test_a_function_with_a_backward_of_its_own_is_refused_and_not_ignored(
    bob: sync.VirtualWorker,
) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    with pytest.raises(wsfed.OpNotAllowed, match=r"torch\.autograd\.Function"):
        Doubled.apply(x) + x
    with pytest.raises(wsfed.OpNotAllowed, match=r"torch\.autograd\.Function"):
        Doubled.apply(x).sum()
    with pytest.raises(wsfed.OpNotAllowed, match="use_reentrant"):
        checkpoint(lambda z: z * z, x, use_reentrant=True).backward(torch.ones(3))
    layer = bob.send(nn.Linear(3, 2))
    layer.register_full_backward_hook(lambda *_: None)
    with pytest.raises(wsfed.OpNotAllowed, match="module backward hooks"):
        layer(x).sum().backward()
    (Doubled.apply(x.detach()) + x).sum().backward()  # nothing would be lost
    assert torch.equal(x.grad.get(), torch.ones(3))


def test_checkpointing_without_reentrance_gives_the_gradients(
    pair: tuple[torch.Tensor, Any],
) -> None:
    local, remote = pair
    for x in pair:
        checkpoint(lambda z: (z * z).exp(), x, use_reentrant=False).sum().backward()
    assert_same_grad(remote, local)


def test_a_gradient_that_is_part_of_a_graph_says_so(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        (x**3).sum().backward(create_graph=True)
        assert (x.grad.requires_grad, x.grad.is_leaf) == (True, False)
        (x.grad**2).sum().backward()
    assert_same_bits(remote.grad.detach(), local.grad)


def test_what_torch_gives_no_gradient_has_none(bob: sync.VirtualWorker) -> None:
    for x in (torch.randn(3, requires_grad=True), bob.send(torch.randn(3, requires_grad=True))):
        y = x.detach().requires_grad_()
        F.cosine_embedding_loss(x[None], y[None] * 2, torch.ones(1)).backward()
        torch.linalg.vector_norm(x, 0).backward()
        z = x.detach().requires_grad_()
        torch.linalg.vector_norm(z, 0).backward()
        assert (x.grad is None, y.grad is None, z.grad is None) == (False, False, True)


def test_a_frozen_leaf_keeps_its_gradient(pair: tuple[torch.Tensor, Any]) -> None:
    local, remote = pair
    for x in pair:
        (x * 3).sum().backward()
        x.requires_grad_(False)
    assert_same_grad(remote, local)
    for x in pair:
        x.grad = None
        x.requires_grad_(True)
        (x * 3).sum().backward()
    assert_same_grad(remote, local)
