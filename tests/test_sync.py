"""The blocking world: no await, in a script, in a notebook and in threads."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import points
from tests.pointers.oracle import assert_same_state
from tests.relay.nodes import enrolled
from wsfed import federated, sync
from wsfed.client.background import background
from wsfed.relay import Hub


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


@pytest.fixture
async def hub_url() -> AsyncIterator[str]:
    async with Hub().listen() as where, enrolled(where, "alice", "bob", tags=["digits"]):
        yield where


@pytest.mark.blocking
async def test_nodes_behind_a_hub_are_used_without_await(hub_url: str) -> None:
    def use() -> torch.Tensor:
        with sync.hub(hub_url) as hub:
            assert [node.id for node in hub.nodes({"digits"})] == ["alice", "bob"]
            first = next(hub.events())
            assert (first.kind, first.node.id) == ("joined", "alice")
            alice, bob = hub.wait_for(2, {"digits"})
            assert hub.workers() == [alice, bob]
            with hub.worker("bob") as again:
                assert again is not bob
                again.flush()
            with pytest.raises(wsfed.NodeUnavailable, match="no node 'carol'"):
                hub.worker("carol")
            with pytest.raises(wsfed.TooFewNodes, match="'alice', 'bob'"):
                hub.wait_for(3, timeout=0)
            return (alice.send(torch.arange(3.0)).move(bob) * 2).get()

    assert torch.equal(await asyncio.to_thread(use), torch.arange(3.0) * 2)
    assert not background.running


@pytest.mark.blocking
async def test_a_hub_that_was_closed_says_so_and_so_do_its_sessions(hub_url: str) -> None:
    def use() -> None:
        with sync.hub(hub_url) as hub:
            alice = hub.worker("alice")
            events = hub.events()
            assert next(events).node.id == "alice"
        hub.close()
        for work in (lambda: hub.worker("alice"), hub.nodes, hub.workers, lambda: next(events)):
            with pytest.raises(wsfed.ConnectionLost, match="closed by this program"):
                work()
        assert alice.closed
        alice.close()

    await asyncio.to_thread(use)
    assert not background.running


async def test_no_hub_is_one_error_and_no_thread() -> None:
    with pytest.raises(wsfed.ConnectionLost, match="is a hub running there"):
        await asyncio.to_thread(sync.hub, "ws://127.0.0.1:1")
    assert not background.running


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


# --- training -------------------------------------------------------------------------------------

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 2))


def rows(number: int) -> list[wsfed.Dataset]:
    held_out = wsfed.Dataset("held-out", points(20, 50 + number))
    return [wsfed.Dataset("points", points(300 + number, number)), held_out]


def told(history: federated.History) -> list[tuple[Any, ...]]:
    return [(each.loss, each.metrics, [s.site for s in each.sites]) for each in history]


@pytest.mark.parametrize(
    "settings",
    [
        {"validation": "held-out", "evaluate": lambda model: model[0].weight.sum().item()},
        {"strategy": federated.FedSGD(0.1), "batch_size": 50},
        {
            "strategy": federated.Scaffold(0.1, sites=2),
            "optimizer": partial(torch.optim.SGD, lr=0.1),
        },
        {"schedule": "sequential", "objective": lambda m, x, y: F.cross_entropy(m(x), y)},
        {"strategy": federated.QFedAvg(1.0), "local_epochs": 2},
    ],
)
def test_training_is_that_of_the_async_world_bit_for_bit(
    one_thread: None, settings: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"rounds": 3, "seed": 5, **settings}
    if "objective" not in settings:
        options["loss"] = F.cross_entropy
    if not isinstance(settings.get("strategy"), federated.FedSGD):
        options.setdefault("optimizer", SGD)
    here, there = network(), network()

    async def program() -> federated.History:
        async with (
            wsfed.VirtualWorker("alice", datasets=rows(1)) as alice,
            wsfed.VirtualWorker("bob", datasets=rows(2)) as bob,
        ):
            return await federated.fit(here, [alice, bob], "points", **options)

    history = asyncio.run(program())
    with (
        sync.VirtualWorker("alice", datasets=rows(1)) as alice,
        sync.VirtualWorker("bob", datasets=rows(2)) as bob,
    ):
        found = sync.fit(there, [alice, bob], "points", **options)
        assert torch.equal(alice.send(torch.ones(2)).get(), torch.ones(2))
    assert_same_state(there, here)
    assert told(found) == told(history)
    assert not background.running


async def test_sockets_are_opened_for_a_training_or_are_there_before() -> None:
    def program(url: str, other: str) -> tuple[nn.Module, nn.Module]:
        opened, given = network(), network()
        openers = [partial(wsfed.connect, url), partial(wsfed.connect, other)]
        sync.fit(opened, openers, "points", F.cross_entropy, SGD, rounds=2)
        assert not background.running
        with sync.connect(url) as alice, sync.connect(other) as bob:
            sync.fit(given, [alice, bob], "points", F.cross_entropy, SGD, rounds=2)
            assert alice.connected
        return opened, given

    async with (
        wsfed.Node("alice", datasets=rows(1)) as one,
        one.listen() as url,
        wsfed.Node("bob", datasets=rows(2)) as two,
        two.listen() as other,
    ):
        assert_same_state(*await asyncio.to_thread(program, url, other))


class Interrupting(federated.Callback):
    """Ctrl-C while a site of the second round is at work, and what the model was before."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._is_sent = model, False
        self.before: nn.Module = model

    def round_begins(self, number: int, sites: list[str]) -> None:
        if number == 2:
            self.before = copy.deepcopy(self._model)

    def batch_done(self, site: str, progress: Any) -> None:
        if self.before is not self._model and not self._is_sent:
            self._is_sent = True
            os.kill(os.getpid(), signal.SIGINT)


async def _tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}


def test_ctrl_c_ends_a_training_and_leaves_nothing_running(one_thread: None) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = network()
    callback = Interrupting(model)
    try:
        with sync.VirtualWorker("alice", datasets=rows(1)) as alice:
            assert alice.flush() is None
            tasks = background.run(alice.link.loop, _tasks())
            with pytest.raises(KeyboardInterrupt):
                sync.fit(
                    *(model, [alice], "points", F.cross_entropy, SGD),
                    rounds=1000,
                    local_epochs=3,
                    callbacks=[callback],
                )
            assert background.run(alice.link.loop, _tasks()) == tasks
            assert callback.before is not model
            assert_same_state(model, callback.before)
            assert torch.equal(alice.send(torch.ones(2)).get(), torch.ones(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not background.running


def test_a_callback_may_end_the_program() -> None:
    class Leaving(federated.Callback):
        def round_ends(self, round: federated.Round, history: federated.History) -> str | None:
            sys.exit(3)

    with sync.VirtualWorker("alice", datasets=rows(1)) as alice:
        with pytest.raises(SystemExit) as caught:
            sync.fit(
                *(network(), [alice], "points", F.cross_entropy, SGD),
                rounds=2,
                callbacks=[Leaving()],
            )
        assert caught.value.code == 3
        assert torch.equal(alice.send(torch.ones(2)).get(), torch.ones(2))
    assert not background.running


def test_a_training_that_fails_raises_what_the_async_one_does() -> None:
    with sync.VirtualWorker("alice", datasets=rows(1)) as alice:
        with pytest.raises(wsfed.FederatedError, match="no data set 'nothing'"):
            sync.fit(network(), [alice], "nothing", F.cross_entropy, SGD, rounds=1)
        with pytest.raises(ValueError, match="rounds=0"):
            sync.fit(network(), [alice], "points", F.cross_entropy, SGD, rounds=0)
        with pytest.raises(wsfed.FederatedError, match="there are no workers"):
            sync.fit(network(), [], "points", F.cross_entropy, SGD, rounds=1)
    assert not background.running


@pytest.mark.blocking
async def test_a_training_takes_the_workers_of_its_world() -> None:
    async with wsfed.VirtualWorker("alice", datasets=rows(1)) as alice:
        with pytest.raises(TypeError, match=r"await wsfed\.federated\.fit"):
            sync.fit(network(), [alice], "points", F.cross_entropy, SGD, rounds=1)
    assert not background.running


def test_a_blocking_worker_is_not_awaited_elsewhere() -> None:
    async def program(alice: sync.VirtualWorker) -> None:
        with pytest.raises(TypeError, match=r"wsfed\.sync\.fit"):
            await federated.fit(network(), [alice], "points", F.cross_entropy, SGD, rounds=1)

    with sync.VirtualWorker("alice", datasets=rows(1)) as alice:
        asyncio.run(program(alice))


def test_a_blocking_call_in_the_loop_is_refused_and_does_not_hang() -> None:
    with pytest.raises(wsfed.ProtocolError, match="blocking call inside the event loop"):
        sync.fit(
            network(),
            [partial(sync.connect, "ws://127.0.0.1:1")],
            *("points", F.cross_entropy, SGD),
            rounds=1,
        )
    assert not background.running


def test_callbacks_await_blocking_workers_and_evaluate_does_not() -> None:
    class Sending(federated.Callback):
        async def round_ends(self, round: federated.Round, history: federated.History) -> str:
            return f"sum {float(await alice.send(torch.ones(3)).sum().get()):g}"

    def evaluate(model: nn.Module) -> float:
        return float(alice.send(torch.ones(2)).sum().item())

    with sync.VirtualWorker("alice", datasets=rows(1)) as alice:
        history = sync.fit(
            *(network(), [alice], "points", F.cross_entropy, SGD),
            rounds=9,
            evaluate=evaluate,
            callbacks=[Sending()],
        )
    assert history.stopped == "sum 3"
    assert history[0].metrics == {"score": 2.0}
