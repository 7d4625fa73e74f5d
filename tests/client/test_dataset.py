"""Data sets from the client's side: batches are made on the worker, in an order anyone can make."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import torch

import wsfed

ROWS = torch.arange(20.0).reshape(10, 2)
LABELS = torch.arange(10)


@pytest.fixture
async def data() -> AsyncIterator[wsfed.RemoteDataset]:
    owned = wsfed.Dataset("rows", {"x": ROWS, "y": LABELS}, open=True)
    async with wsfed.VirtualWorker("bob", datasets=[owned]) as bob:
        yield await bob.dataset("rows")


async def test_a_data_set_tells_what_it_is(data: wsfed.RemoteDataset) -> None:
    assert (len(data), data.name, data.open) == (10, "rows", True)
    assert data.fields["x"].shape == (10, 2)
    assert data.fields["y"].dtype == torch.int64
    assert "10 rows" in repr(data)
    assert torch.equal(await data["x"].get(), ROWS)


async def test_the_order_of_a_loader_is_that_of_a_permutation_with_its_seed(
    data: wsfed.RemoteDataset,
) -> None:
    loader = data.loader(3, shuffle=True, seed=5)
    assert len(loader) == 4
    for epoch in range(2):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch))
        batches = [(await x.get(), await y.get()) for x, y in loader]
        assert torch.equal(torch.cat([x for x, _ in batches]), ROWS[order])
        assert torch.equal(torch.cat([y for _, y in batches]), LABELS[order])
    loader.epoch = 0
    first, _ = next(iter(loader))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(await first.get(), ROWS[order[:3]])


async def test_batches_have_the_shapes_that_their_pointers_say(data: wsfed.RemoteDataset) -> None:
    for drop_last, sizes in ((False, [4, 4, 2]), (True, [4, 4])):
        loader = data.loader(4, drop_last=drop_last)
        assert [len(x) for x, _ in loader] == sizes
        for x, y in loader:
            assert (await x.get()).shape == x.shape
            assert (await y.get()).shape == y.shape


async def test_wrong_names_and_numbers_are_told(data: wsfed.RemoteDataset) -> None:
    with pytest.raises(wsfed.NotFound, match="it has 'x', 'y'"):
        data["z"]
    with pytest.raises(wsfed.NotFound, match="no field 'z'; it has 'x', 'y'"):
        data.batch(3, 0, fields=["z"])
    with pytest.raises(IndexError, match="no batch 9 of 3"):
        data.batch(3, 9)
    for make in (lambda: data.batch(-1, 0), lambda: data.loader(0)):
        with pytest.raises(ValueError, match="batch_size has to be at least one row"):
            make()
    with pytest.raises(ValueError, match="at least one row"):
        data.loader(0)
    async with wsfed.VirtualWorker("empty") as other:
        with pytest.raises(wsfed.NotFound, match="no data set 'rows' on this worker; it has none"):
            await other.dataset("rows")


async def test_tags_and_descriptions_find_an_object_again() -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        bob.send(torch.ones(2)).tag("#other")
        kept = bob.send(torch.arange(3)).tag("#data", "#small").describe("three numbers")
        (found,) = await bob.search("#data", "#small")
        assert torch.equal(await found.get(), torch.arange(3))
        assert found.shape == kept.shape
        assert await bob.search("#data", "#other") == []
