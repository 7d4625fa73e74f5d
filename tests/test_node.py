"""A node: sessions apart, nothing delayed by heavy work, nothing left behind, doors that lock."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

import wsfed
from tests.certificates import tls
from wsfed import testing
from wsfed.node import check_exposure
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer, decode, encode, pack
from wsfed.tensors import outgoing
from wsfed.worker.session import Done, Event


@pytest.fixture
async def node() -> AsyncIterator[wsfed.Node]:
    async with wsfed.Node("bob") as made:
        yield made


@pytest.fixture
async def url(node: wsfed.Node) -> AsyncIterator[str]:
    async with node.listen() as where:
        yield where


# --- sessions apart ------------------------------------------------------------------------------


async def test_two_clients_get_their_own_objects_and_replies(url: str) -> None:
    async def work(value: float) -> list[float]:
        async with wsfed.connect(url) as worker:
            total = worker.send(torch.zeros(()))
            asked = []
            for _ in range(50):
                total = total + value
                asked.append(total.get())
                await asyncio.sleep(0)
            return [float(await each) for each in asked]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(value)) for value in (1.0, 2.0, 3.0)]
    for value, task in zip((1.0, 2.0, 3.0), tasks, strict=True):
        assert task.result() == [value * n for n in range(1, 51)]


async def test_a_heavy_operation_delays_neither_another_session_nor_a_sign_of_life(
    url: str,
) -> None:
    async with wsfed.connect(url) as busy, testing.worker_over(lambda: testing.dial(url)) as quick:
        await quick.flush()
        matrix = busy.send(torch.randn(1200, 1200))
        for _ in range(8):
            matrix = torch.linalg.inv(matrix)
        heavy = asyncio.ensure_future(matrix.get())
        await asyncio.sleep(0)
        wire = await testing.dial(url)
        await wire.send(encode(0, 0, [pack(m.Hello(m.VERSION, None, None, "").wire())]))
        await wire.receive()
        for number in range(20):
            await wire.send(encode(0, 0, [pack(m.Ping().wire())]))
            answer = decode(await wire.receive())
            assert m.parse(answer.messages[0], (m.CONTROL,)) == m.Ack()
            assert torch.equal(
                await quick.send(torch.ones(2) * number).get(), torch.ones(2) * number
            )
        assert not heavy.done(), "the others were served while it ran"
        await heavy
        await wire.close()


# --- nothing left behind -------------------------------------------------------------------------


async def test_a_client_that_leaves_or_vanishes_leaves_nothing_behind(
    node: wsfed.Node, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SESSION_TTL_SECONDS", 0.2)
    async with wsfed.connect(url) as worker:
        await worker.send(torch.ones(3)).get()
        assert node.info["sessions"] == 1
    await until(lambda: node.info["sessions"] == 0)

    wire = await testing.dial(url)
    await wire.send(encode(0, 0, [pack(m.Hello(m.VERSION, None, None, "").wire())]))
    await wire.receive()
    assert node.info["sessions"] == 1
    wire._socket.transport.abort()
    await until(lambda: node.info["sessions"] == 0)


async def until(condition: object) -> None:
    """Turn after turn of the loop, until it holds; the test's own timeout ends it."""
    assert callable(condition)
    while not condition():
        await asyncio.sleep(0)


async def test_a_dropped_pointer_frees_its_object() -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        x = bob.send(torch.ones(1000))
        for _ in range(100):
            x = x + 1
        await bob.flush()
        (hosted,) = bob._node._sessions.values()
        del x
        gc.collect()
        await bob.flush()
        await bob.flush()
        assert len(hosted.interpreter.store) == 0


async def test_a_session_goes_on_after_its_socket_broke(node: wsfed.Node, url: str) -> None:
    wires: list[testing.Wire] = []

    async def open_wire() -> testing.Wire:
        wires.append(await testing.dial(url))
        return wires[-1]

    async with testing.worker_over(open_wire, reconnect=20) as worker:
        total = worker.send(torch.zeros(()))
        for _ in range(5):
            total.add_(1)
            await worker.flush()
            wires[-1]._socket.transport.abort()  # type: ignore[attr-defined]
        assert (await total.get()).item() == 5
    assert len(wires) >= 5


async def test_a_second_connection_takes_a_session_over(node: wsfed.Node, url: str) -> None:
    first = await testing.dial(url)
    await first.send(encode(0, 0, [pack(m.Hello(m.VERSION, None, None, "").wire())]))
    welcome = m.parse(decode(await first.receive()).messages[0], (m.CONTROL,))
    assert isinstance(welcome, m.Welcome)
    second = await testing.dial(url)
    resume = m.Resume(m.VERSION, welcome.session, welcome.token, welcome.epoch, 0)
    await second.send(encode(0, 0, [pack(resume.wire())]))
    resumed = m.parse(decode(await second.receive()).messages[0], (m.CONTROL,))
    assert isinstance(resumed, m.Resumed)
    with pytest.raises(testing.WireLost):
        await first.receive()
    assert node.info["sessions"] == 1
    await second.close()


async def test_a_second_connection_takes_over_from_one_that_nobody_reads(
    node: wsfed.Node,
) -> None:
    _, welcome = await unread(node)
    second = await over_memory(node)
    resume = m.Resume(m.VERSION, welcome.session, welcome.token, welcome.epoch, 0)
    await second.send(encode(0, 0, [pack(resume.wire())]))
    assert isinstance(await answer_on(second), m.Resumed)
    await second.close()


async def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsfed.node.hosted._GOODBYE_SECONDS", 0.1)
    async with wsfed.Node("bob") as ending:
        first, _ = await unread(ending)
    with pytest.raises(testing.WireLost):
        while True:
            await first.receive()


async def unread(node: wsfed.Node) -> tuple[testing.Wire, m.Welcome]:
    """A connection on which more was asked for than is read, so that the worker cannot write."""
    wire = await over_memory(node)
    await wire.send(encode(0, 0, [pack(m.Hello(m.VERSION, None, None, "").wire())]))
    welcome = await answer_on(wire)
    assert isinstance(welcome, m.Welcome)
    large = m.Execute("torch.Tensor.repeat", [2], [[0, 1], 3_000_000], {}, 0)
    commands = [m.Store(1, 0, False, False), large, m.Get(3, 2)]
    await wire.send(
        encode(1, 0, [pack(each.wire()) for each in commands], [outgoing(torch.ones(1))])
    )
    assert isinstance(await answer_on(wire), m.OpenStream)
    (hosted,) = node._sessions.values()
    sender = hosted.protocol.sender
    sent = -1
    while sent != sender.sent:  # until the wire is full
        sent = sender.sent
        for _ in range(50):
            await asyncio.sleep(0)
    return wire, welcome


async def answer_on(wire: testing.Wire) -> m.Message:
    kinds = (m.CONTROL, m.REPLIES, m.STREAM)
    return m.parse(decode(await wire.receive()).messages[0], kinds)


async def test_shutting_down_says_goodbye(node: wsfed.Node) -> None:
    async with node.listen() as url:
        worker = await wsfed.connect(url)
        pointer = worker.send(torch.ones(2))
        await worker.flush()
    with pytest.raises(wsfed.SessionLost, match="the worker is shutting down"):
        while True:
            await pointer.get()
    await worker.close()


async def test_a_worker_that_breaks_tells_and_does_not_leave_its_client_waiting(
    node: wsfed.Node, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsfed.connect(url) as bob:
        await bob.flush()
        (hosted,) = node._sessions.values()
        sound = hosted.handle

        def broken(event: Event) -> None:
            if isinstance(event, Done):
                raise KeyError("a bug")
            sound(event)

        monkeypatch.setattr(hosted, "handle", broken)
        with pytest.raises(wsfed.WsfedError, match="the worker failed; its log says how"):
            await bob.send(torch.ones(3)).sum()
    assert "a session cannot go on" in caplog.text
    assert not node._sessions


async def test_cancelled_commands_do_not_run(url: str) -> None:
    async with wsfed.connect(url) as worker:
        first = worker.send(torch.randn(800, 800))
        await worker.flush()
        x = first
        for _ in range(200):
            x = torch.linalg.inv(x)
            await asyncio.sleep(0)
        asked = x.get()
        await asyncio.sleep(0)
        worker.cancel()
        with pytest.raises(wsfed.Cancelled):
            await asked
        assert torch.equal(await (first * 1).get(), await first.get())


# --- limits --------------------------------------------------------------------------------------


async def test_a_session_that_used_up_its_memory_lives_on() -> None:
    async with (
        wsfed.Node("bob", max_memory=3_000_000) as small,
        small.listen() as url,
        wsfed.connect(url) as worker,
    ):
        kept = worker.send(torch.ones(250_000))  # 1 MB, in chunks
        for too_much in (worker.send(torch.ones(1_000_000)), kept.repeat(5)):
            with pytest.raises(wsfed.QuotaExceeded, match="--max-memory"):
                await too_much.get()
        assert torch.equal(await (kept + 1).get(), torch.full((250_000,), 2.0))


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 75_000, 5_000_000])
async def test_tensors_of_any_size_come_back_bit_for_bit(url: str, size: int) -> None:
    tensor = torch.randn(size)
    async with wsfed.connect(url) as worker:
        assert torch.equal(await worker.send(tensor).get(), tensor)


async def test_replies_wait_for_a_client_that_reads_slowly(node: wsfed.Node, url: str) -> None:
    async with wsfed.connect(url) as worker:
        large = worker.send(torch.ones(2_000_000))
        asked = [large.get() for _ in range(8)]  # 64 MB of replies, four windows
        for each in asked:
            assert (await each).shape == (2_000_000,)


# --- doors ---------------------------------------------------------------------------------------


async def test_a_token_lets_in_who_has_it_and_nobody_else() -> None:
    async with wsfed.Node("bob", token="secret") as locked, locked.listen() as url:
        async with wsfed.connect(url, token="secret") as worker:
            await worker.flush()
        for wrong, said in (("guess", "the token is wrong"), (None, "a token is needed")):
            with pytest.raises(wsfed.AuthenticationFailed, match=said):
                await wsfed.connect(url, token=wrong)


async def test_a_worker_can_be_reached_with_tls_by_those_who_trust_it(
    node: wsfed.Node, tmp_path: Path
) -> None:
    server, client = tls(tmp_path)
    async with node.listen(ssl=server) as url:
        assert url.startswith("wss://")
        async with wsfed.connect(url, ssl=client) as worker:
            assert (await worker.send(torch.ones(())).get()).item() == 1
        with pytest.raises(wsfed.ConnectionLost, match="certificate"):
            await wsfed.connect(url)


@pytest.mark.parametrize(
    ("host", "tls", "token", "insecure", "refused"),
    [
        ("127.0.0.1", False, False, False, False),
        ("::1", False, False, False, False),
        ("0.0.0.0", False, False, False, True),
        ("0.0.0.0", True, False, False, True),
        ("10.0.0.1", False, True, False, True),
        ("0.0.0.0", True, True, False, False),
        ("0.0.0.0", False, False, True, False),
    ],
)
def test_beyond_this_machine_tls_and_a_token_are_needed(
    host: str, tls: bool, token: bool, insecure: bool, refused: bool
) -> None:
    assert (check_exposure(host, tls=tls, token=token, insecure=insecure) is not None) is refused


# --- from worker to worker -----------------------------------------------------------------------


async def test_a_move_between_two_nodes_that_reach_each_other_goes_directly(url: str) -> None:
    tensor = torch.randn(500_000)
    async with (
        wsfed.Node("alice") as other,
        other.listen() as there,
        wsfed.connect(url) as bob,
        wsfed.connect(there) as alice,
    ):
        pointer = bob.send(tensor)
        await bob.flush()
        _, received = bob.traffic
        moved = pointer.move(alice)
        doubled = moved * 2
        await alice.flush()
        assert bob.traffic[1] - received < 10_000
        assert alice.traffic[0] < 10_000
        assert torch.equal(await doubled.get(), tensor * 2)
        assert moved.location is alice


async def test_a_move_between_nodes_that_do_not_reach_each_other_takes_the_detour() -> None:
    tensor = torch.randn(300_000)
    async with (
        wsfed.Node("bob", direct=False) as one,
        one.listen() as here,
        wsfed.Node("alice") as other,
        other.listen() as there,
        wsfed.connect(here) as bob,
        wsfed.connect(there) as alice,
    ):
        pointer = bob.send(tensor)
        moved = pointer.move(alice)
        pointer.add_(1)  # after the move: no matter there
        assert torch.equal(await (moved * 2).get(), tensor * 2)
        assert torch.equal(await pointer.get(), tensor + 1)


async def test_the_value_that_moves_is_that_of_the_moment_even_if_the_direct_way_fails(
    url: str,
) -> None:
    async with (
        wsfed.connect(url) as bob,
        wsfed.Node("alice") as other,
        testing.worker_over(lambda: over_memory(other), url="ws://127.0.0.1:9") as alice,
    ):
        pointer = bob.send(torch.zeros(3))
        moved = pointer.move(alice)  # bob tries to dial port 9, and cannot
        pointer.add_(1)
        assert torch.equal(await moved.get(), torch.zeros(3))
        again = pointer.move(alice)  # known not to be reached by now
        pointer.add_(1)
        assert torch.equal(await again.get(), torch.ones(3))


SERVING: set[asyncio.Task[None]] = set()


async def over_memory(node: wsfed.Node) -> testing.Wire:
    near, far = testing.memory_wires()
    task = asyncio.ensure_future(node.serve(far))
    SERVING.add(task)
    task.add_done_callback(SERVING.discard)
    return near


async def test_moving_what_was_never_made_tells_the_first_cause(url: str) -> None:
    async with (
        wsfed.connect(url) as bob,
        wsfed.Node("alice") as other,
        other.listen() as there,
        wsfed.connect(there) as alice,
    ):
        bad = bob.send(torch.arange(3)).gather(0, bob.send(torch.tensor([9])))
        moved = bad.move(alice) + 1
        with pytest.raises(wsfed.RemoteError, match="out of bounds"):
            await moved.get()
        assert (await alice.send(torch.ones(())).get()).item() == 1


async def test_a_ticket_that_nobody_announced_opens_nothing(
    node: wsfed.Node, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsfed.node.node._TICKET_SECONDS", 0.1)
    wire = await testing.dial(url)
    await wire.send(encode(0, 0, [pack(m.Hello(m.VERSION, None, b"x" * 16, "").wire())]))
    answer: Buffer = await wire.receive()
    refused = m.parse(decode(answer).messages[0], (m.CONTROL,))
    assert isinstance(refused, m.Refused)
    assert refused.error == "ticket"
    assert node.info["sessions"] == 0


async def test_the_first_sums_of_a_session_come_in_the_order_of_all_others() -> None:
    """A thread that has not asked for torch's number of threads takes another one at first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        async with wsfed.VirtualWorker("bob") as bob:
            sent = bob.send(x)
            assert torch.equal(await sent.dot(sent), x.dot(x))
    finally:
        torch.set_num_threads(threads)
