"""The blocking world: no await, in a script, in a notebook and in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch
from torch import nn

import wsfed
from tests.pointers.oracle import assert_same_state
from wsfed import sync
from wsfed.client.background import background


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with wsfed.Node("bob") as node, node.listen() as where:
        yield where


def test_a_value_comes_without_await() -> None:
    with sync.VirtualWorker("bob") as bob:
        x = bob.send(torch.arange(3.0))
        assert torch.equal((x + 1).get(), torch.tensor([1.0, 2.0, 3.0]))
        assert bob.flush() is None
        assert bob.id == "bob"
        assert x.location is bob


def test_the_background_thread_ends_with_the_last_worker() -> None:
    assert not background.running
    with sync.VirtualWorker("bob"):
        assert background.running
        with sync.VirtualWorker("alice"):
            assert background.running
        assert background.running
        assert any(thread.name == "wsfed" for thread in threading.enumerate())
    assert not background.running
    assert not any(thread.name == "wsfed" for thread in threading.enumerate())


def test_a_worker_may_be_closed_twice() -> None:
    bob = sync.VirtualWorker("bob")
    bob.close()
    bob.close()
    assert bob.closed
    assert not background.running
    with pytest.raises(wsfed.WsfedError):
        bob.send(torch.ones(1))


def test_a_virtual_worker_without_a_loop_is_a_blocking_one() -> None:
    with wsfed.VirtualWorker("bob") as bob:
        assert torch.equal(bob.send(torch.ones(2)).get(), torch.ones(2))


async def test_a_virtual_worker_within_a_loop_is_awaited() -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        assert torch.equal(await bob.send(torch.ones(2)).get(), torch.ones(2))


@pytest.mark.blocking
async def test_it_works_inside_a_running_loop_as_in_a_notebook(url: str) -> None:
    def cells() -> None:
        with sync.VirtualWorker("alice") as alice:
            x = alice.send(torch.ones(2))
            assert (x + x).sum().item() == 4

    assert asyncio.get_running_loop().is_running()
    cells()
    # This loop serves the node, so the cells that use its socket run beside it.
    with await asyncio.to_thread(sync.connect, url) as bob:
        x = bob.send(torch.ones(2))
        assert torch.equal(await asyncio.to_thread((x * 2).get), torch.full((2,), 2.0))
        await asyncio.to_thread(bob.close)


async def test_a_worker_behind_a_socket_is_used_without_await(url: str) -> None:
    def program() -> None:
        with sync.connect(url, id="bob") as bob:
            local, remote = nn.Linear(2, 1), nn.Linear(2, 1)
            remote.load_state_dict(local.state_dict())
            x = torch.ones(3, 2)
            bob.send(remote)
            local(x).sum().backward()
            remote(bob.send(x)).sum().backward()
            sync.get(remote)
            assert_same_state(remote, local)
            assert bob.info["id"] == "bob"

    await asyncio.to_thread(program)


async def test_tensors_move_between_blocking_workers_behind_sockets(url: str) -> None:
    def program(other: str) -> None:
        with sync.connect(url) as bob, sync.connect(other) as alice:
            x = bob.send(torch.arange(3.0)).move(alice).move(bob)
            assert torch.equal(x.get(), torch.arange(3.0))

    async with wsfed.Node("alice") as node, node.listen() as other:
        await asyncio.to_thread(program, other)


def test_nobody_there_is_one_error_and_no_thread() -> None:
    with pytest.raises(wsfed.ConnectionLost, match=r"no connection to ws://127\.0\.0\.1:1"):
        sync.connect("ws://127.0.0.1:1")
    assert not background.running


def test_what_is_no_url_is_told() -> None:
    with pytest.raises(ValueError, match="ws://"):
        sync.connect("127.0.0.1:8777")
    assert not background.running


def test_several_threads_share_a_worker() -> None:
    failures: list[BaseException] = []

    def work(bob: sync.VirtualWorker, number: int) -> None:
        try:
            for _ in range(20):
                x = bob.send(torch.full((4,), float(number)))
                assert torch.equal((x * 2).get(), torch.full((4,), 2.0 * number))
        except BaseException as error:
            failures.append(error)

    with sync.VirtualWorker("bob") as bob:
        threads = [threading.Thread(target=work, args=(bob, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_operations_do_not_wait() -> None:
    with sync.VirtualWorker("bob") as bob:
        x = bob.send(torch.zeros(2))
        received = bob.traffic[1]
        for _ in range(50):
            x.add_(1)
        assert bob.traffic[1] - received < 2000
        assert x.tolist() == [50, 50]


def test_a_failure_is_raised_where_its_value_is_wanted() -> None:
    with sync.VirtualWorker("bob") as bob:
        lost = bob.send(torch.ones(3))[bob.send(torch.tensor([9]))]
        for want in (lost.get, lost.item, lost.tolist, bob.send(lost).get):
            with pytest.raises(wsfed.RemoteError, match="out of bounds"):
                want()


def test_two_worlds_do_not_mix() -> None:
    async def program(x: wsfed.Pointer) -> None:
        async with wsfed.VirtualWorker("alice") as alice:
            with pytest.raises(wsfed.NotCollocated):
                alice.send(torch.ones(2)) + x

    with sync.VirtualWorker("bob") as bob:
        asyncio.run(program(bob.send(torch.ones(2))))


def test_the_functions_are_those_of_the_package() -> None:
    for name in ("send", "move", "copy"):
        assert getattr(sync, name) is getattr(wsfed, name)
    assert set(sync.__all__) <= set(dir(sync))


async def test_what_is_of_the_async_world_is_not_got_here() -> None:
    async with wsfed.VirtualWorker("carol") as carol:
        x = carol.send(torch.ones(2))
        with pytest.raises(wsfed.PointerError, match=r"await wsfed\.get"):
            sync.get(x)
        assert torch.equal(await wsfed.get(x), torch.ones(2))
