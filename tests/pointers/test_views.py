"""Tensors that share memory share what is written to it, and torch's rules for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.pointers.oracle import assert_same_bits, assert_same_grad
from wsfed import sync


def weight() -> torch.Tensor:
    return torch.tensor(2.0, requires_grad=True)


#: What is written where; gives the tensor that has to depend on the weight afterwards.
WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "through a view, read at the base": lambda x, w: (x[1:].mul_(w), x)[1],
    "to the base, read at a view": lambda x, w: ((v := x[1:]), x.mul_(w), v)[0],
    "through one view, read at another": lambda x, w: (
        (v := x.view(2, 2)),
        x[1:].mul_(w),
        v,
    )[0],
    "elsewhere in the same memory": lambda x, w: ((v := x[:2]), x[2:].mul_(w), v)[0],
    "through a view of a view, read at the first": lambda x, w: (
        (v := x.view(2, 2)),
        v[0].mul_(w),
        v,
    )[0],
    "through the first, read at a view of a view": lambda x, w: (
        (v := x.view(2, 2)),
        (u := v[0]),
        v.mul_(w),
        u,
    )[1],
    "to an index of a view": lambda x, w: ((v := x.view(2, 2)), v.__setitem__(0, w * 3), x)[2],
    "twice": lambda x, w: (x.mul_(w), x[1:].add_(w), x)[2],
}


@pytest.mark.parametrize("graph", [False, True], ids=["no graph before", "a graph before"])
@pytest.mark.parametrize("name", WRITES)
def test_what_shares_memory_depends_on_what_is_written_to_it(
    name: str, graph: bool, bob: sync.VirtualWorker
) -> None:
    local = torch.arange(4.0, requires_grad=graph), weight()
    remote = tuple(bob.send(each) for each in local)
    seen = []
    for x, w in (local, remote):
        whole = x * 1
        found = WRITES[name](whole, w)
        seen.append((found.requires_grad, found.is_leaf, whole.requires_grad, whole.is_leaf))
        (found**2).sum().backward()
    assert seen[0] == seen[1] == (True, False, True, False)
    for one, other in zip(remote, local, strict=True):
        assert_same_grad(one, other)


def test_a_write_that_is_not_recorded_makes_nothing_depend(bob: sync.VirtualWorker) -> None:
    x, w = bob.send(torch.ones(3)), bob.send(weight())
    view = x[1:]
    with torch.no_grad():
        view.mul_(w)
    assert (x.requires_grad, view.requires_grad) == (False, False)
    assert_same_bits(x, torch.tensor([1.0, 2.0, 2.0]))


LEAF_WRITES: dict[str, Callable[[Any], Any]] = {
    "a view": lambda x: x.view(4).mul_(2),
    "a slice": lambda x: x[1:].zero_(),
    "a view of a view": lambda x: x.view(2, 2)[0].add_(1),
    "an index": lambda x: x.__setitem__(0, 1.0),
    "an index of a view": lambda x: x[1:].__setitem__(0, 1.0),
}


@pytest.mark.parametrize("name", LEAF_WRITES)
def test_writing_through_a_view_of_a_leaf_is_torchs_own_error(
    name: str, bob: sync.VirtualWorker
) -> None:
    local = torch.ones(4, requires_grad=True)
    remote = bob.send(local)
    texts = []
    for x in (local, remote):
        with pytest.raises(RuntimeError, match="a view of a leaf Variable") as error:
            LEAF_WRITES[name](x)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert remote.is_leaf
    bob.flush()  # nothing failed there, since nothing was sent
    with torch.no_grad():
        LEAF_WRITES[name](local)
        LEAF_WRITES[name](remote)
    assert_same_bits(remote, local)


def test_a_view_outlives_the_stay_of_its_base(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    norm = nn.BatchNorm1d(3)
    bob.send(norm)
    view = norm.running_mean[1:]
    sync.get(norm)
    alice.send(norm)
    norm.running_mean.add_(1)
    assert view.location is bob
    assert_same_bits(view * 2, torch.zeros(2))
