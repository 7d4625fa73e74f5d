"""Rows of a data set that the owner did not mark open stay on the worker."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wsfed

ROWS = torch.arange(12.0).reshape(4, 3)
LABELS = torch.tensor([0, 1, 2, 0])


def datasets() -> list[wsfed.Dataset]:
    fields = {"features": ROWS, "labels": LABELS}
    return [wsfed.Dataset("secret", fields), wsfed.Dataset("public", fields, open=True)]


@pytest.fixture
async def clinic() -> AsyncIterator[wsfed.VirtualWorker]:
    async with wsfed.VirtualWorker("clinic", datasets=datasets()) as worker:
        yield worker


def written(x: Any, worker: wsfed.Worker) -> Any:
    other = worker.send(torch.zeros(4, 3))
    other.copy_(x)
    return other


def assigned(x: Any, worker: wsfed.Worker) -> Any:
    other = worker.send(torch.zeros(5, 3))
    other[1:] = x
    return other


def seen_through_a_view(x: Any, worker: wsfed.Worker) -> Any:
    other = worker.send(torch.zeros(4, 3))
    view = other[0]
    other.copy_(x)
    return view


def as_gradient(x: Any, worker: wsfed.Worker) -> Any:
    parameter = worker.send(torch.zeros(4, 3, requires_grad=True))
    parameter.grad = x
    return parameter.grad


def as_data(x: Any, worker: wsfed.Worker) -> Any:
    parameter = worker.send(torch.zeros(4, 3, requires_grad=True))
    parameter.data = x
    return parameter


TRICKS: dict[str, Callable[[Any, wsfed.Worker], Any]] = {
    "the rows": lambda x, _: x,
    "a view": lambda x, _: x[1:],
    "one row": lambda x, _: x[0],
    "one number": lambda x, _: x[0, 0],
    "a transposed view": lambda x, _: x.t(),
    "a reshaped view": lambda x, _: x.reshape(-1),
    "a copy": lambda x, _: x.clone(),
    "a pointer's copy": lambda x, _: x.copy(),
    "a detached one": lambda x, _: x.detach(),
    "a slice by index": lambda x, w: x.index_select(0, w.send(torch.tensor([2]))),
    "a masked selection": lambda x, w: x[w.send(torch.tensor([0, 3]))],
    "times one": lambda x, _: x * 1,
    "plus zero": lambda x, _: 0 + x,
    "another dtype": lambda x, _: x.double(),
    "a concatenation": lambda x, w: torch.cat([w.send(torch.zeros(1, 3)), x]),
    "a stack": lambda x, _: torch.stack([x, x]),
    "a split": lambda x, _: x.split(2)[1],
    "where": lambda x, _: torch.where(x > 5, x, x),
    "sorted": lambda x, _: x.sort().values,
    "the largest": lambda x, _: x.max(1).values,
    "einsum": lambda x, _: torch.einsum("ij->ji", x),
    "written into another": written,
    "assigned to a slice": assigned,
    "seen through an older view": seen_through_a_view,
    "as a gradient": as_gradient,
    "as data": as_data,
    "an unreduced loss": lambda x, w: F.mse_loss(x, w.send(torch.zeros(4, 3)), reduction="none"),
    "a loss unreduced by place": lambda x, w: F.l1_loss(
        x, w.send(torch.zeros(4, 3)), None, None, "none"
    ),
    "drawn by the rows": lambda x, _: torch.bernoulli(x.clamp(0, 1)),
    "the largest's place": lambda x, _: x.argmax(1),
    "labels": lambda x, _: x,
}


@pytest.mark.parametrize("trick", TRICKS)
async def test_rows_are_not_for_fetching(clinic: wsfed.VirtualWorker, trick: str) -> None:
    data = await clinic.dataset("secret")
    rows = data["labels" if trick == "labels" else "features"]
    result = TRICKS[trick](rows, clinic)
    with pytest.raises(wsfed.GetNotPermitted, match="rows of the private data set 'secret'"):
        await result.get()
    with pytest.raises(wsfed.GetNotPermitted):
        async with wsfed.VirtualWorker("other") as other:
            await result.move(other).get()


@pytest.mark.parametrize("trick", [name for name in TRICKS if name != "labels"])
async def test_rows_that_the_owner_marked_open_are(clinic: wsfed.VirtualWorker, trick: str) -> None:
    data = await clinic.dataset("public")
    result = TRICKS[trick](data["features"], clinic)
    async with wsfed.VirtualWorker("other") as other:
        here = TRICKS[trick](other.send(ROWS), other)
        assert torch.equal(await result.get(), await here.get())


async def test_batches_of_a_loader_are_rows_too(clinic: wsfed.VirtualWorker) -> None:
    data = await clinic.dataset("secret")
    for features, labels in data.loader(2, shuffle=True):
        for pointer in (features, labels):
            with pytest.raises(wsfed.GetNotPermitted):
                await pointer.get()


async def test_what_is_trained_on_rows_may_leave(clinic: wsfed.VirtualWorker) -> None:
    data = await clinic.dataset("secret")
    torch.manual_seed(0)
    here = nn.Linear(3, 3)
    there = clinic.send(wsfed.copy(here))
    loss = F.cross_entropy(there(data["features"]), data["labels"])
    loss.backward()
    await wsfed.get(there)
    expected = F.cross_entropy(here(ROWS), LABELS)
    expected.backward()
    assert torch.equal(await loss.get(), expected.detach())
    assert there.weight.grad is not None
    assert here.weight.grad is not None
    assert torch.equal(there.weight.grad, here.weight.grad)


async def test_an_error_on_private_rows_tells_no_value(clinic: wsfed.VirtualWorker) -> None:
    data = await clinic.dataset("secret")
    bad = F.embedding(data["labels"] + 7, clinic.send(torch.zeros(3, 2)))
    with pytest.raises(wsfed.RemoteError) as caught:
        await bad.sum().get()
    assert caught.value.message == (
        "the operation failed on private data, so its message stays on the worker"
    )
    assert caught.value.type == "IndexError"
    assert caught.value.op == "torch.nn.functional.embedding"


async def test_one_error_is_told_of_many_gets_with_the_line_and_nothing_else(
    clinic: wsfed.VirtualWorker, caplog: pytest.LogCaptureFixture
) -> None:
    data = await clinic.dataset("secret")
    pointers = [data["features"], data["labels"]]
    layer = nn.Linear(3, 4)
    clinic.send(layer)
    with torch.no_grad():
        layer.weight.copy_(data["features"])
        layer.bias.copy_(data["features"][:, 0])
    for value in (pointers, layer):
        with pytest.raises(wsfed.GetNotPermitted) as caught:
            await wsfed.get(value)
        assert __file__ in caught.value.site
    del value, caught, pointers
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_refused_move_names_worker_and_line(clinic: wsfed.VirtualWorker) -> None:
    data = await clinic.dataset("secret")
    async with wsfed.VirtualWorker("other") as other:
        moved = data["features"].move(other)
        with pytest.raises(wsfed.GetNotPermitted) as caught:
            await moved.get()
    assert caught.value.worker == "clinic"
    assert __file__ in caught.value.site


async def test_a_search_finds_data_sets_by_name_and_gives_no_rows(
    clinic: wsfed.VirtualWorker,
) -> None:
    found = await clinic.search("#secret")
    assert [pointer.shape for pointer in found] == [(4, 3), (4,)]
    with pytest.raises(wsfed.GetNotPermitted):
        await found[0].get()
