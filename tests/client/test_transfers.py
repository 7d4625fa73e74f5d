"""Objects from worker to worker: what arrives, in which order, and what happens if it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from torch import nn

import wsfed
from wsfed import testing
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer, decode, encode, pack

#: How the two workers reach each other.
WAYS = ["directly", "through the client", "in this process"]


@asynccontextmanager
async def two_workers(way: str) -> AsyncIterator[tuple[wsfed.Worker, wsfed.Worker]]:
    if way == "in this process":
        async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
            yield bob, alice
        return
    async with (
        wsfed.Node("bob", direct=way == "directly") as one,
        one.listen() as here,
        wsfed.Node("alice", direct=way == "directly") as other,
        other.listen() as there,
        wsfed.connect(here) as bob,
        wsfed.connect(there) as alice,
    ):
        yield bob, alice


@pytest.fixture(params=WAYS)
async def pair(
    request: pytest.FixtureRequest,
) -> AsyncIterator[tuple[wsfed.Worker, wsfed.Worker]]:
    async with two_workers(request.param) as both:
        yield both


Pair = tuple[wsfed.Worker, wsfed.Worker]


@pytest.mark.parametrize("numbers", [0, 1, 75_000, 5_000_000])
async def test_tensors_of_any_size_arrive_bit_for_bit(pair: Pair, numbers: int) -> None:
    bob, alice = pair
    tensor = torch.randint(-(2**31), 2**31 - 1, (numbers,), dtype=torch.int32)
    moved = bob.send(tensor).move(alice)
    assert moved.location is alice
    assert torch.equal(await moved.get(), tensor)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float16, torch.complex64, torch.uint8], ids=str
)
async def test_tensors_of_any_dtype_arrive(pair: Pair, dtype: torch.dtype) -> None:
    bob, alice = pair
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype).t()
    moved = bob.send(tensor).move(alice)
    assert (moved.dtype, moved.shape) == (dtype, (3, 2))
    assert torch.equal(await moved.get(), tensor)


async def test_operations_wait_for_what_moves_and_for_nothing_else(pair: Pair) -> None:
    bob, alice = pair
    moving = bob.send(torch.full((600_000,), 2.0)).move(alice)
    for _ in range(3):
        moving = moving * 2
    late = alice.send(torch.ones(3))
    assert torch.equal(await moving.get(), torch.full((600_000,), 16.0))
    assert torch.equal(await late.get(), torch.ones(3))


async def test_what_moves_is_the_value_of_that_moment(pair: Pair) -> None:
    bob, alice = pair
    source = bob.send(torch.zeros(100_000))
    moved = []
    for _ in range(4):
        moved.append(source.move(alice))
        source.add_(1)
    for number, each in enumerate(moved):
        assert torch.equal(await each.get(), torch.full((100_000,), float(number)))
    assert torch.equal(await source.get(), torch.full((100_000,), 4.0))


async def test_there_and_back_again(pair: Pair) -> None:
    bob, alice = pair
    tensor = torch.randn(20_000)
    pointer = bob.send(tensor)
    for _ in range(3):
        pointer = (pointer.move(alice) + 1).move(bob)
    assert pointer.location is bob
    assert torch.equal(await pointer.get(), tensor + 1 + 1 + 1)


async def test_a_copy_leaves_the_original_and_is_independent_of_it(pair: Pair) -> None:
    bob, alice = pair
    original = bob.send(torch.zeros(3))
    copied = original.copy(alice)
    original.add_(1)
    copied.sub_(1)
    assert torch.equal(await original.get(), torch.ones(3))
    assert torch.equal(await copied.get(), -torch.ones(3))


async def test_a_leaf_that_requires_grad_arrives_as_one(pair: Pair) -> None:
    bob, alice = pair
    leaf = bob.send(torch.ones(3, requires_grad=True)).move(alice)
    assert leaf.requires_grad and leaf.is_leaf
    (leaf * 3).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(await leaf.grad.get(), torch.full((3,), 3.0))  # type: ignore[attr-defined]
    home = await leaf.get()
    assert home.requires_grad and home.is_leaf


async def test_a_module_moves_whole(pair: Pair) -> None:
    bob, alice = pair
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    there = bob.send(wsfed.copy(here))
    wsfed.move(there, alice)
    x = torch.randn(5, 4)
    assert torch.equal(await there(alice.send(x)).get(), here(x).detach())
    await wsfed.get(there)
    for name, value in here.state_dict().items():
        assert torch.equal(there.state_dict()[name], value), name


async def test_two_that_send_to_each_other_do_not_wait_for_each_other(pair: Pair) -> None:
    bob, alice = pair
    x, y = bob.send(torch.full((200_000,), 1.0)), alice.send(torch.full((200_000,), 2.0))
    for _ in range(5):
        x, y = y.move(bob) + 1, x.move(alice) * 2
    a, b = torch.full((200_000,), 1.0), torch.full((200_000,), 2.0)
    for _ in range(5):
        a, b = b + 1, a * 2
    assert torch.equal(await x.get(), a)
    assert torch.equal(await y.get(), b)


async def test_what_failed_before_it_moved_is_told_where_it_was_to_go(pair: Pair) -> None:
    bob, alice = pair
    for _ in range(2):  # the first move tries the way, the second one knows it
        bad = bob.send(torch.arange(3)).gather(0, bob.send(torch.tensor([9])))
        with pytest.raises(wsfed.RemoteError, match="out of bounds"):
            await (bad.move(alice) + 1).get()
    assert torch.equal(await alice.send(torch.ones(2)).get(), torch.ones(2))
    assert torch.equal(await bob.send(torch.ones(2)).move(alice).get(), torch.ones(2))


async def test_what_does_not_fit_there_is_told_and_both_live_on() -> None:
    for direct in (True, False):
        async with (
            wsfed.Node("bob", direct=direct) as one,
            one.listen() as here,
            wsfed.Node("small", max_memory=100_000) as other,
            other.listen() as there,
            wsfed.connect(here) as bob,
            wsfed.connect(there) as small,
        ):
            with pytest.raises(wsfed.QuotaExceeded):
                await bob.send(torch.ones(200_000)).move(small).get()
            assert torch.equal(await bob.send(torch.ones(2)).move(small).get(), torch.ones(2))


@pytest.mark.parametrize("way", ["directly", "through the client"])
@pytest.mark.parametrize(
    ("lost", "error"), [("source", wsfed.WsfedError), ("target", wsfed.ConnectionLost)]
)
async def test_a_side_that_is_lost_does_not_leave_the_other_waiting(
    way: str, lost: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsfed.node.node._TICKET_SECONDS", 0.2)
    async with two_workers(way) as (bob, alice):
        gone, left = (bob, alice) if lost == "source" else (alice, bob)
        await asyncio.gather(bob.flush(), alice.flush())
        asked = bob.send(torch.ones(3_000_000)).move(alice).get()
        await gone.close()
        with pytest.raises(error):
            await asked
        assert torch.equal(await left.send(torch.ones(2)).get(), torch.ones(2))


async def test_a_session_that_ends_in_the_middle_of_a_delivery_ends_the_delivery() -> None:
    async with wsfed.Node("alice") as node:
        first, second = testing.memory_wires()
        serving = asyncio.ensure_future(node.serve(second))
        await first.send(frame(0, m.Hello(m.VERSION, None, None, "")))
        await first.receive()
        await first.send(frame(1, m.Receive([7], b"t" * 16)))
        near, far = testing.memory_wires()
        delivering = asyncio.ensure_future(node.serve(far))
        await near.send(frame(0, m.Hello(m.VERSION, None, b"t" * 16, "")))
        assert isinstance(await said(near), m.Welcome)
        await first.send(frame(0, m.Goodbye("done")))
        while not isinstance(answer := await said(near), m.Goodbye):
            pass
        assert "is over" in answer.reason
        await asyncio.gather(serving, delivering)
        assert node._tickets == {}


async def test_tickets_that_nobody_used_go_with_their_session() -> None:
    async with wsfed.Node("alice") as node, node.listen() as url:
        async with wsfed.connect(url) as alice:
            for number in range(300):
                alice.link.issue(m.Receive([number + 1], number.to_bytes(16)).wire())
            await alice.flush()
            assert 0 < len(node._tickets) <= 256
        while node._tickets:
            await asyncio.sleep(0)


def frame(seq: int, message: m.Message) -> list[Buffer]:
    return encode(seq, 0, [pack(message.wire())])


async def said(wire: testing.Wire) -> m.Message:
    return m.parse(decode(await wire.receive()).messages[0], (m.CONTROL, m.REPLIES))


async def test_a_direct_move_costs_the_client_no_more_than_its_commands() -> None:
    async with two_workers("directly") as (bob, alice):
        pointer = bob.send(torch.randn(1_000_000))
        await bob.flush()
        before = bob.traffic[0] + bob.traffic[1] + sum(alice.traffic)
        moved = pointer.move(alice)
        await alice.flush()
        assert bob.traffic[0] + bob.traffic[1] + sum(alice.traffic) - before < 5_000
        assert torch.equal(await moved.get(), await pointer.get())


async def test_moving_to_where_it_is_does_nothing() -> None:
    recorder = testing.Recorder()
    async with (
        wsfed.Node("bob") as node,
        node.listen() as url,
        testing.worker_over(recorder.wrap(lambda: testing.dial(url))) as bob,
    ):
        pointer = bob.send(torch.ones(2))
        await bob.flush()
        before = len(recorder.frames)
        assert pointer.move(bob) is pointer
        assert len(recorder.frames) == before
