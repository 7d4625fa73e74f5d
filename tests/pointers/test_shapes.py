"""What a call gives is inferred once, and calls that differ are told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.pointers.oracle import assert_same
from wsfed import sync
from wsfed.pointers import calls, shapes
from wsfed.pointers.shapes import ShapeCache, intern_meta, meta_of


@pytest.fixture
def inferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the calls that are inferred, with an empty cache to begin with."""
    names: list[str] = []
    infer = calls.infer

    def note(name: str, *rest: Any) -> Any:
        names.append(name)
        return infer(name, *rest)

    monkeypatch.setattr(calls, "infer", note)
    monkeypatch.setattr(calls, "_cache", ShapeCache())
    return names


def test_a_second_call_like_the_first_is_not_inferred(
    inferred: list[str], bob: sync.VirtualWorker
) -> None:
    model = bob.send(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()))
    optimizer = torch.optim.Adam(model.parameters())
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(bob.send(torch.ones(2, 1, 4, 4))), torch.zeros(2, 8)).backward()
        optimizer.step()
        counts.append(len(inferred))
    assert counts[0] > 0
    assert counts[2] == counts[3]


def test_a_fraction_does_not_make_another_call(
    inferred: list[str], bob: sync.VirtualWorker
) -> None:
    x = bob.send(torch.ones(3))
    results = [(x * factor).get()[0].item() for factor in (0.5, 1.5, 2.5)]
    assert results == [0.5, 1.5, 2.5]
    assert len(inferred) == 1


def test_whole_numbers_truth_and_fractions_are_told_apart(
    inferred: list[str], bob: sync.VirtualWorker
) -> None:
    x = torch.tensor([1, 2])
    remote = bob.send(x)
    for number in (1, True, 1.0, 1j):
        assert_same(remote * number, x * number)
    y = torch.tensor([True, False])
    remote = bob.send(y)
    for number in (1.0, True, 1, 0, False, 0.0):
        assert_same(remote + number, y + number)
    assert len(inferred) >= 7


@pytest.mark.parametrize(
    "variants",
    [
        [lambda x: x[0], lambda x: x[False], lambda x: x[True], lambda x: x[1]],
        [lambda x: x.sum(0), lambda x: x.sum(1), lambda x: x.sum((0, 1)), lambda x: x.sum([0])],
        [lambda x: x[0:1], lambda x: x[0:2], lambda x: x[::2], lambda x: x[None:None:1]],
        [lambda x: x[[0]], lambda x: x[(0,)], lambda x: x[0,], lambda x: x[[0], [1]]],
        [lambda x: x.sum(0, keepdim=True), lambda x: x.sum(0, keepdim=False)],
        [lambda x: x.sum(dtype=torch.float64), lambda x: x.sum(dtype=torch.float32)],
        [lambda x: x.to(torch.int64), lambda x: x.to(torch.int32), lambda x: x.to("cpu")],
        [lambda x, s=s: F.interpolate(x[None], scale_factor=s) for s in (2.0, 3.0, 0.5)],
        [lambda x, n=n: x.view(*n) for n in ((6,), (3, 2), (1, 6), (-1,))],
        [lambda x: torch.cat([x, x]), lambda x: torch.cat([x, x, x]), lambda x: torch.cat((x, x))],
    ],
    ids=range(10),
)
def test_calls_that_differ_give_what_each_gives(
    variants: list[Callable[[Any], Any]], bob: sync.VirtualWorker
) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    remote = bob.send(x)
    for _ in range(2):
        for variant in variants:
            assert_same(variant(remote), variant(x))


def test_modes_are_told_apart(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, requires_grad=True))
    for _ in range(2):
        assert (x * 2).requires_grad
        with torch.no_grad():
            assert not (x * 2).requires_grad
        with torch.inference_mode():
            assert not (x * 2).requires_grad


def test_tensors_that_require_grad_are_told_apart(bob: sync.VirtualWorker) -> None:
    x, y = bob.send(torch.ones(2, requires_grad=True)), bob.send(torch.ones(2))
    for _ in range(2):
        assert not (y * 2).requires_grad
        assert (x * 2).requires_grad
        assert (x * y).requires_grad
        assert ((x * 2) * y).requires_grad


def test_strides_are_told_apart(bob: sync.VirtualWorker) -> None:
    x = torch.arange(9.0).reshape(3, 3)
    remote = bob.send(x)
    for _ in range(2):
        assert_same(remote * 1, x * 1)
        assert_same(remote.t() * 1, x.t() * 1)
        assert_same(remote.t().contiguous(), x.t().contiguous())
        assert_same(remote[0].expand(3, 3) * 1, x[0].expand(3, 3) * 1)


def test_a_local_tensor_is_told_from_a_pointer(bob: sync.VirtualWorker) -> None:
    x, y = bob.send(torch.ones(2)), torch.ones(2)
    for _ in range(2):
        assert torch.equal((x + y).get(), (x + x).get())
        assert torch.equal((y + x).get(), torch.full((2,), 2.0))


def test_the_seed_of_a_call_is_not_remembered(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(64))
    bob.manual_seed(0)
    first, second = F.dropout(x), F.dropout(x)
    assert not torch.equal(first.get(), second.get())


def test_a_call_that_failed_fails_again(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, 3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="invalid for input of size 6"):
            x.view(4)
    assert x.view(6).shape == (6,)


def test_what_is_remembered_is_bounded(
    monkeypatch: pytest.MonkeyPatch, inferred: list[str], bob: sync.VirtualWorker
) -> None:
    monkeypatch.setattr(shapes, "_MOST", 10)
    x = bob.send(torch.ones(64))
    for length in range(1, 40):
        assert x[:length].shape == (length,)
        assert (x[:length] * 2).shape == (length,)
        assert len(calls._cache._known) <= 10
    assert torch.equal((x[:3] * 2).get(), torch.full((3,), 2.0))


def test_equal_metadata_is_one_object() -> None:
    made = intern_meta((2, 3), (3, 1), torch.float32, False, True)
    assert meta_of(torch.ones(2, 3)) is made
    assert meta_of(torch.ones(3, 2).t()) is not made
    assert meta_of(torch.ones(2, 3, requires_grad=True)) is not made


def test_inference_leaves_no_graph_behind(inferred: list[str], bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, requires_grad=True))
    y = (x * 2).exp()
    assert not any(
        isinstance(value, torch.Tensor)
        for known in calls._cache._known.values()
        for value in (*known.outs, *known.changed)
    )
    assert y.requires_grad
