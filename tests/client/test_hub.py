"""Nodes behind a hub are workers like any other; who comes and goes is told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wsfed
from tests.certificates import tls
from tests.relay.nodes import enrolled, enrolled_by_hand, until
from wsfed import federated, testing
from wsfed.protocol import limits
from wsfed.relay import Hub


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with Hub().listen() as where:
        yield where


async def test_a_node_behind_a_hub_behaves_as_every_worker_has_to(url: str) -> None:
    async with enrolled(url, "alice"), wsfed.hub(url) as hub:
        assert await testing.check_worker(lambda: hub.worker("alice"))


async def test_a_session_is_the_nodes_and_not_the_hubs(url: str) -> None:
    async with enrolled(url, "alice") as (node,), wsfed.hub(url) as hub:
        async with hub.worker("alice") as alice:
            assert alice.id == alice.info["id"] == "alice"
            assert alice.url == f"alice@{url}"
            x = alice.send(torch.arange(3.0))
            assert torch.equal(await (x * 2), torch.arange(3.0) * 2)
            (objects,) = node.objects()
            assert any(torch.equal(each, torch.arange(3.0)) for each in objects.values())
        await until(lambda: node.info["sessions"] == 0)


async def test_tensors_move_between_nodes_that_cannot_reach_each_other(url: str) -> None:
    async with enrolled(url, "alice", "bob"), wsfed.hub(url) as hub:
        alice, bob = await hub.wait_for(2)
        moved = alice.send(torch.arange(4.0)).move(bob)
        assert moved.location is bob
        assert torch.equal(await (moved + 1), torch.arange(4.0) + 1)


async def test_a_tensor_moves_to_a_worker_that_listens_and_back(url: str) -> None:
    async with (
        enrolled(url, "alice"),
        wsfed.hub(url) as hub,
        wsfed.Node("bob") as node,
        node.listen() as there,
        hub.worker("alice") as alice,
        wsfed.connect(there) as bob,
    ):
        moved = alice.send(torch.arange(4.0)).move(bob)
        assert torch.equal(await (moved + 1).move(alice), torch.arange(4.0) + 1)


async def test_who_comes_and_goes_is_told_in_order(url: str) -> None:
    async with enrolled(url, "alice", tags=["digits"]), wsfed.hub(url) as hub:
        events = hub.events()
        first = await anext(events)
        assert (first.kind, first.node.id, first.node.tags) == ("joined", "alice", {"digits"})
        assert first.node.profile == "torch"
        assert f"torch/{torch.__version__}" in first.node.capabilities
        async with enrolled(url, "bob"):
            second = await anext(events)
            assert (second.kind, second.node.id) == ("joined", "bob")
        third = await anext(events)
        assert (third.kind, third.node.id) == ("left", "bob")
        assert "the node has left" in third.reason
        assert [node.id for node in hub.nodes()] == ["alice"]
    assert [event async for event in events] == []


async def test_waiting_ends_when_enough_nodes_with_the_tags_are_there(url: str) -> None:
    async with wsfed.hub(url) as hub:
        waiting = asyncio.ensure_future(hub.wait_for(2, {"digits"}))
        async with enrolled(url, "alice", "bob", tags=["other", "digits"]):
            assert sorted(worker.id for worker in await waiting) == ["alice", "bob"]


async def test_waiting_in_vain_names_who_is_there(url: str) -> None:
    async with (
        enrolled(url, "alice", tags=["digits"]),
        enrolled(url, "bob"),
        wsfed.hub(url) as hub,
    ):
        with pytest.raises(wsfed.TooFewNodes, match=r"'alice'; without these tags: 'bob'") as told:
            await hub.wait_for(2, {"digits"}, timeout=0)
        assert told.value.there == ("alice",)
        assert told.value.others == ("bob",)


async def test_waiting_for_a_node_that_does_not_dial_back_says_so(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIAL_BACK_SECONDS", 0.01)
    monkeypatch.setattr("wsfed.client.hub._PAUSE", 0.0)
    async with enrolled_by_hand(url, "mute"), enrolled(url, "alice"), wsfed.hub(url) as hub:
        assert [worker.id for worker in await hub.workers()] == ["alice"]
        with pytest.raises(wsfed.TooFewNodes, match="'mute' did not dial back") as told:
            await hub.wait_for(2, timeout=0.1)
        assert told.value.there == ("alice",)
        assert [worker.id for worker in await hub.wait_for(1)] == ["alice"]


async def test_the_same_sessions_are_given_until_they_end(url: str) -> None:
    async with enrolled(url, "alice", "bob"), wsfed.hub(url) as hub:
        alice, bob = await hub.workers()
        assert await hub.workers() == [alice, bob] == await hub.wait_for(2)
        await alice.close()
        fresh, same = await hub.workers()
        assert fresh is not alice and same is bob
        assert torch.equal(await fresh.send(torch.ones(2)), torch.ones(2))


async def test_sessions_end_with_the_hub_that_opened_them(url: str) -> None:
    async with enrolled(url, "alice") as (node,):
        async with wsfed.hub(url) as hub:
            alice = await hub.worker("alice")
        assert alice.closed
        with pytest.raises(wsfed.ConnectionLost, match="closed by this program"):
            hub.worker("alice")
        await until(lambda: node.info["sessions"] == 0)


async def test_sessions_that_were_lost_leave_nothing_behind(url: str) -> None:
    async with wsfed.hub(url) as hub:
        for _ in range(3):
            async with enrolled(url, "alice", "bob"):
                alice, bob = await hub.wait_for(2)
                await alice.flush()
            await until(lambda a=alice, b=bob: a.closed and b.closed and not hub.nodes())
            assert hub._workers == {alice, bob}
        assert alice._installed and bob._installed, "nobody has closed them"
    assert not alice._installed and not bob._installed


async def test_a_node_that_is_not_there_is_told_with_who_is(url: str) -> None:
    async with enrolled(url, "alice"), wsfed.hub(url) as hub:
        with pytest.raises(wsfed.NodeUnavailable, match="no node 'carol'; there is 'alice'") as no:
            await hub.worker("carol")
        assert (no.value.node, no.value.code) == ("carol", "no-node")


async def test_a_node_that_leaves_ends_its_sessions_with_one_error(url: str) -> None:
    async with wsfed.hub(url) as hub:
        async with enrolled(url, "alice"):
            alice = await hub.worker("alice")
            x = alice.send(torch.ones(3))
            await x
        with pytest.raises(wsfed.SessionLost, match="shutting down"):
            await x


async def test_a_node_that_vanishes_is_given_up_after_a_while(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsfed.node.hosted._GOODBYE_SECONDS", 0)
    async with wsfed.hub(url) as hub:
        async with enrolled(url, "alice") as (node,):
            alice = await hub.worker("alice", reconnect=0.1)
            x = alice.send(torch.ones(3))
            await x
            for hosted in node._sessions.values():
                hosted.say_goodbye = lambda reason: None  # as if it were killed
        with pytest.raises(wsfed.NodeUnavailable, match="none is enrolled") as lost:
            await x
        assert (lost.value.worker, lost.value.code) == ("alice", "no-node")


async def test_no_hub_another_server_and_a_wrong_token_are_told_apart() -> None:
    async with wsfed.Node("bob") as node, node.listen() as worker:
        with pytest.raises(wsfed.RemoteProtocolError, match="is no hub"):
            await wsfed.hub(worker)
    with pytest.raises(wsfed.ConnectionLost, match="is a hub running there"):
        await wsfed.hub(worker)
    async with Hub(token="right").listen() as url:
        for token, says in ((None, "a token is needed"), ("wrong", "the token is wrong")):
            with pytest.raises(wsfed.AuthenticationFailed, match=says):
                await wsfed.hub(url, token=token)
        with pytest.raises(wsfed.RemoteProtocolError, match=r"this is a hub: .*wsfed\.hub\(url\)"):
            await wsfed.connect(url)
    with pytest.raises(ValueError, match="write ws://host:port"):
        wsfed.hub("http://127.0.0.1:1")


async def test_hub_node_and_client_speak_tls(tmp_path: Path) -> None:
    there, here = tls(tmp_path)
    async with (
        Hub(token="t").listen(ssl=there) as url,
        wsfed.Node("alice") as node,
        node.enrol(url, token="t", ssl=here) as enrolment,
        wsfed.hub(url, token="t", ssl=here) as hub,
    ):
        assert url.startswith("wss://")
        await enrolment.enrolled.wait()
        async with hub.worker("alice") as alice:
            x = alice.send(torch.arange(100_000.0))
            assert torch.equal(await (x + 1), torch.arange(100_000.0) + 1)
        with pytest.raises(wsfed.ConnectionLost, match="not trusted"):
            await wsfed.hub(url, token="t")


async def test_nodes_and_clients_have_tokens_of_their_own() -> None:
    async with Hub(token="clients", node_token="nodes").listen() as url:
        async with wsfed.Node("mallory") as node, node.enrol(url, token="clients") as refused:
            await refused.failed.wait()
            assert isinstance(refused.error, wsfed.AuthenticationFailed)
        with pytest.raises(wsfed.AuthenticationFailed):
            await wsfed.hub(url, token="nodes")
        async with (
            enrolled(url, "alice", token="nodes"),
            wsfed.hub(url, token="clients") as hub,
            hub.worker("alice") as alice,
        ):
            assert torch.equal(await alice.send(torch.ones(2)), torch.ones(2))


async def test_a_node_asks_for_its_own_token_behind_the_hub(url: str) -> None:
    async with (
        wsfed.Node("alice", token="mine") as node,
        node.enrol(url) as enrolment,
        wsfed.hub(url) as hub,
    ):
        await enrolment.enrolled.wait()
        with pytest.raises(wsfed.AuthenticationFailed, match="alice@"):
            await hub.worker("alice")
        async with hub.worker("alice", token="mine") as alice:
            await alice.flush()


async def test_training_over_a_hub_equals_training_over_sockets(url: str, one_thread: None) -> None:
    torch.manual_seed(0)
    rows = [
        wsfed.Dataset("points", {"x": torch.randn(24, 3), "y": torch.randn(24, 1)})
        for _ in range(2)
    ]

    async def train(workers: list[object]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        await federated.fit(
            model,
            workers,
            "points",
            F.mse_loss,
            partial(torch.optim.SGD, lr=0.1),
            rounds=2,
            batch_size=8,
        )
        return [each.detach().clone() for each in model.parameters()]

    async with (
        wsfed.Node("a", datasets=rows[:1]) as a,
        wsfed.Node("b", datasets=rows[1:]) as b,
        a.listen() as there_a,
        b.listen() as there_b,
        a.enrol(url),
        b.enrol(url),
        wsfed.hub(url) as hub,
    ):
        direct = await train([partial(wsfed.connect, where) for where in (there_a, there_b)])
        await hub.wait_for(2)
        by_handle = await train(sorted(await hub.workers(), key=lambda worker: worker.id))
        by_opener = await train([partial(hub.worker, name) for name in "ab"])
    for one, other, third in zip(direct, by_handle, by_opener, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_a_hub_that_has_worked_has_loaded_no_torch() -> None:
    program = (
        "import asyncio, sys\n"
        "from wsfed.protocol import messages as m\n"
        "from wsfed.relay import Hub\n"
        "from wsfed.transport.line import answer, call, open_line\n"
        "async def main():\n"
        "    async with Hub().listen() as url:\n"
        "        said = m.Enrol(1, None, 'a', b'', 'torch', [], [])\n"
        "        line, _ = await open_line(url, said, (m.Enrolled,))\n"
        "        calling = asyncio.ensure_future(call(url, 'a'))\n"
        "        node = await answer(url, (await line.hear()).ticket)\n"
        "        client = await calling\n"
        "        await client.send([b'x']); assert await node.receive() == b'x'\n"
        "        await client.close(); await line.wire.close()\n"
        "asyncio.run(main())\n"
        "import wsfed.cli\n"
        "print({'torch', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
