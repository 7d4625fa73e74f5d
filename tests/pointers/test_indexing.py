"""Indices, masks, and shapes that depend on values: those of torch, and never a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import wsfed
from tests.pointers.oracle import assert_same, check
from wsfed import sync


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


INDICES: dict[str, Any] = {
    "a number": 1,
    "a negative number": -1,
    "a slice": slice(1, 3),
    "an open slice": slice(None, -1),
    "steps": (slice(None), slice(None, None, 2)),
    "an ellipsis": (..., 0),
    "a new dimension": (None, ..., None),
    "a mixture": (slice(1, None), None, ..., 1),
    "a list": [0, 2, 2],
    "an index tensor": torch.tensor([2, 0]),
    "two index tensors": (torch.tensor([2, 0]), torch.tensor([1, 1])),
    "an index tensor and a slice": (slice(None), torch.tensor([0, 2])),
    "True": True,
    "nothing": (),
}


@pytest.mark.parametrize("name", INDICES)
def test_indexing_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    check(bob, lambda x: x[INDICES[name]], leaf(4, 3, 2))


@pytest.mark.parametrize("name", INDICES)
def test_assignment_to_an_index_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    def assign(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[INDICES[name]] = value
        return y

    check(bob, assign, leaf(4, 3, 2), torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("value", [0, 2.5, True, torch.tensor(3.0)], ids=str)
def test_constants_are_assigned(value: Any, bob: sync.VirtualWorker) -> None:
    def assign(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[1:, ::2] = value
        return y

    check(bob, assign, leaf(4, 3))


def test_indices_may_be_on_the_worker(bob: sync.VirtualWorker) -> None:
    check(bob, lambda x, i: x[i], leaf(4, 3), torch.tensor([3, 1]))
    check(bob, lambda x, i: x[:, i, None], leaf(4, 3), torch.tensor([2, 2]))


def test_a_boolean_mask_is_transparent_in_the_blocking_world(bob: sync.VirtualWorker) -> None:
    check(bob, lambda x: x[x > 0], leaf(4, 3))
    check(bob, lambda x, mask: x[mask] * 2, leaf(4, 3), torch.tensor([True, False, True, True]))

    def assign(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[x > 0] = 0.5
        return y

    check(bob, assign, leaf(4, 3))


DEPEND_ON_VALUES: dict[str, tuple[Callable[[Any], Any], torch.Tensor]] = {
    "nonzero": (lambda x: x.nonzero(), torch.tensor([[1, 0], [2, 3]])),
    "argwhere": (torch.argwhere, torch.tensor([[1, 0], [2, 3]])),
    "masked_select": (lambda x: x.masked_select(x > 0) * 3, leaf(4, 3)),
    "unique": (torch.unique, torch.tensor([3, 1, 3])),
    "bincount": (torch.bincount, torch.tensor([3, 1, 3])),
    "repeat_interleave": (
        lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), 0),
        leaf(4, 2),
    ),
    "one_hot": (F.one_hot, torch.tensor([0, 2, 1])),
}


@pytest.mark.parametrize("name", DEPEND_ON_VALUES)
def test_a_shape_that_depends_on_values_is_the_true_one(name: str, bob: sync.VirtualWorker) -> None:
    function, x = DEPEND_ON_VALUES[name]
    check(bob, function, x)


SEVERAL_UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "nonzero(as_tuple)": lambda x: torch.nonzero(x > 2, as_tuple=True),
    "Tensor.nonzero(as_tuple)": lambda x: (x > 2).nonzero(as_tuple=True),
    "nonzero(as_tuple) of a number": lambda x: torch.nonzero(x[0, 0] >= 0, as_tuple=True),
    "where": lambda x: torch.where(x > 2),
    "unique with inverse": lambda x: torch.unique(x.long(), return_inverse=True),
    "unique with all": lambda x: torch.unique(x.long(), return_inverse=True, return_counts=True),
    "Tensor.unique": lambda x: x.long().unique(),
    "Tensor.unique with counts": lambda x: x.long().unique(return_counts=True),
    "unique_consecutive": lambda x: torch.unique_consecutive(x.long(), return_counts=True),
}


@pytest.mark.parametrize("name", SEVERAL_UNKNOWN)
def test_several_shapes_that_depend_on_values_are_the_true_ones(
    name: str, bob: sync.VirtualWorker
) -> None:
    check(bob, SEVERAL_UNKNOWN[name], torch.arange(6.0).reshape(2, 3) % 4)


async def test_several_shapes_that_depend_on_values_are_resolved(
    carol: wsfed.VirtualWorker,
) -> None:
    rows, columns = torch.where(carol.send(torch.eye(3)) > 0)
    assert (await rows.resolve()).shape == (await columns.resolve()).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_a_local_tensor_is_indexed_by_a_pointer(
    dtype: torch.dtype, bob: sync.VirtualWorker
) -> None:
    local, places = torch.eye(3).to(dtype), torch.tensor([2, 0])
    assert_same(local[bob.send(places)], local[places])
    assert_same(local[:, bob.send(places)], local[:, places])
    assert_same(local[bob.send(places), bob.send(places)], local[places, places])


def test_a_mask_there_beside_other_indices(bob: sync.VirtualWorker) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    mask, places = torch.tensor([True, True]), torch.tensor([1, 0])
    assert_same(bob.send(x)[bob.send(mask), places], x[mask, places])
