"""Every worker passes the same checks, and the tools tell the truth."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from torch import nn

import wsfed
from wsfed import testing
from wsfed.protocol.limits import CHUNK_BYTES


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with wsfed.Node("bob") as node, node.listen() as where:
        yield where


async def test_a_worker_in_this_process_passes() -> None:
    passed = await testing.check_worker(lambda: wsfed.VirtualWorker("bob"))
    assert len(passed) == len(testing.CHECKS)


async def test_a_worker_behind_a_socket_passes(url: str) -> None:
    passed = await testing.check_worker(lambda: wsfed.connect(url))
    assert len(passed) == len(testing.CHECKS)


async def test_a_worker_that_forgets_what_it_was_sent_does_not_pass() -> None:
    class Forgetful(wsfed.VirtualWorker):
        def send(self, value: object) -> object:
            return super().send(torch.zeros_like(value))  # type: ignore[call-overload]

    with pytest.raises(AssertionError, match="a tensor comes back as it was"):
        await testing.check_worker(lambda: Forgetful("bob"))


async def test_the_tutorial_takes_two_round_trips_a_step(url: str) -> None:
    recorder = testing.Recorder()
    opened = recorder.wrap(lambda: testing.dial(url))
    steps = 5
    async with testing.worker_over(opened) as bob:
        x, y = bob.send(torch.ones(2, 2)), bob.send(torch.ones(2, 1))
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            x.location.send(model)
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum()
            loss.backward()
            optimizer.step()
            await wsfed.get(model)
            await loss.get()
    assert recorder.round_trips == 2 * steps


async def test_a_tensor_takes_its_bytes_and_two_per_cent_at_most(url: str) -> None:
    recorder = testing.Recorder()
    tensor = torch.randn(4 * 2**20)
    async with testing.worker_over(recorder.wrap(lambda: testing.dial(url))) as bob:
        assert torch.equal(await bob.send(tensor).get(), tensor)
    for direction in ("sent", "received"):
        assert tensor.nbytes < recorder.nbytes(direction) <= 1.02 * tensor.nbytes
    assert max(len(data) for _, data in recorder.frames) <= CHUNK_BYTES + 1024


@pytest.mark.parametrize("messages", range(2, 40, 3))
async def test_a_wire_that_breaks_anywhere_changes_nothing(url: str, messages: int) -> None:
    breaks = iter([messages, messages, messages])

    async def open_wire() -> testing.Wire:
        wire = await testing.dial(url)
        left = next(breaks, None)
        return wire if left is None else testing.FaultyWire(wire, left)

    async with testing.worker_over(open_wire, reconnect=20) as bob:
        total = bob.send(torch.zeros(150_000))
        for _ in range(20):
            total.add_(1)
            await bob.flush()
        assert torch.equal(await total.get(), torch.full((150_000,), 20.0))


async def test_a_session_that_the_worker_forgot_is_lost_and_nothing_hangs() -> None:
    first, second = wsfed.Node("bob"), wsfed.Node("bob")
    nodes = iter([first, second])

    @asynccontextmanager
    async def listening() -> AsyncIterator[list[str]]:
        async with first, first.listen() as one, second, second.listen() as two:
            yield [one, two]

    async with listening() as urls:

        async def open_wire() -> testing.Wire:
            number = 0 if next(nodes) is first else 1
            wire = await testing.dial(urls[number])
            return testing.FaultyWire(wire, 6) if number == 0 else wire

        async with testing.worker_over(open_wire, reconnect=20) as bob:
            pointer = bob.send(torch.ones(2))
            with pytest.raises(wsfed.SessionLost, match="restarted"):
                for _ in range(20):
                    await bob.flush()
            with pytest.raises(wsfed.SessionLost):
                pointer.get()
