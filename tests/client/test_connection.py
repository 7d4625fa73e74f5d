"""The client's end of a session: batches, requests, failures, and the ends it can come to."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import AsyncIterator

import pytest
import torch

import wsfed
from wsfed import testing
from wsfed.client import connection as connection_module
from wsfed.client.connection import Connection
from wsfed.pointers.pointer import make_pointer
from wsfed.protocol import limits
from wsfed.protocol import messages as m

OUT_OF_BOUNDS = torch.tensor([9])


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with wsfed.Node("bob") as node, node.listen() as where:
        yield where


@pytest.fixture
def recorder() -> testing.Recorder:
    return testing.Recorder()


@pytest.fixture
async def bob(url: str, recorder: testing.Recorder) -> AsyncIterator[wsfed.Worker]:
    async with testing.worker_over(recorder.wrap(lambda: testing.dial(url))) as worker:
        yield worker


def sent(recorder: testing.Recorder, kind: type[m.Message]) -> list[m.Message]:
    return [
        message
        for direction, message in recorder.messages()
        if direction == "sent" and isinstance(message, kind)
    ]


# --- commands ------------------------------------------------------------------------------------


async def test_what_is_issued_in_one_turn_of_the_loop_leaves_in_one_frame(
    bob: wsfed.Worker, recorder: testing.Recorder
) -> None:
    await bob.flush()
    x = bob.send(torch.zeros(3))
    await bob.flush()
    before = len(recorder.frames)
    for _ in range(100):
        x = x + 1
    asked = x.get()
    assert torch.equal(await asked, torch.full((3,), 100.0))
    frames = [data for direction, data in recorder.frames[before:] if direction == "sent"]
    batches = [each for each in frames if len(each) > 100]
    assert len(batches) == 1


async def test_operations_have_no_replies(bob: wsfed.Worker, recorder: testing.Recorder) -> None:
    x = bob.send(torch.zeros(3))
    for _ in range(50):
        x.add_(1)
    await bob.flush()
    kinds = [each.kind for way, each in recorder.messages() if way == "received"]
    assert kinds.count(m.REPLIES) == 1


async def test_an_operation_is_named_once_and_numbered_from_then_on(
    bob: wsfed.Worker, recorder: testing.Recorder
) -> None:
    x = bob.send(torch.zeros(3))
    for _ in range(3):
        x = x.mul(2).abs()
    await bob.flush()
    ops = [command.op for command in sent(recorder, m.Execute)]  # type: ignore[attr-defined]
    assert ops == ["torch.Tensor.mul", "torch.Tensor.abs", 0, 1, 0, 1]


async def test_dropped_pointers_are_deleted_together(
    bob: wsfed.Worker, recorder: testing.Recorder
) -> None:
    kept = [bob.send(torch.zeros(3)) for _ in range(20)]
    ids = {each.id_at_location for each in kept}
    await bob.flush()
    del kept
    gc.collect()
    await bob.flush()
    await bob.flush()
    deletes = sent(recorder, m.Delete)
    assert len(deletes) == 1
    assert set(deletes[0].ids) == ids  # type: ignore[attr-defined]


async def test_requests_are_sent_whether_they_are_awaited_or_not(bob: wsfed.Worker) -> None:
    x = bob.send(torch.ones(2))
    asked = x.get()
    asked.cancel()
    await bob.flush()
    assert torch.equal(await x.get(), torch.ones(2)), "the reply to the cancelled one harms nobody"


async def test_another_thread_may_issue(bob: wsfed.Worker) -> None:
    x = bob.send(torch.zeros(2))

    def add() -> None:
        for _ in range(100):
            x.add_(1)

    await asyncio.gather(*(asyncio.to_thread(add) for _ in range(3)))
    assert torch.equal(await x.get(), torch.full((2,), 300.0))


async def test_traffic_is_what_passed_on_the_wire(
    bob: wsfed.Worker, recorder: testing.Recorder
) -> None:
    await bob.send(torch.randn(100_000)).get()
    assert bob.traffic == (recorder.nbytes("sent"), recorder.nbytes("received"))


# --- failures ------------------------------------------------------------------------------------


async def test_a_failure_tells_op_shapes_message_and_the_line(bob: wsfed.Worker) -> None:
    bad = bob.send(torch.arange(3)).gather(0, bob.send(OUT_OF_BOUNDS))
    with pytest.raises(wsfed.RemoteError) as caught:
        await (bad + 1).get()
    error = caught.value
    assert (error.op, error.type, error.worker) == ("torch.Tensor.gather", "RuntimeError", "bob")
    assert error.shapes == ("int64[3]", "int64[1]")
    assert "out of bounds" in error.message
    path, line = error.site.rsplit(":", 1)
    with open(path, encoding="utf-8") as source:
        assert "gather" in source.read().splitlines()[int(line) - 1]


async def test_a_flush_raises_the_first_failure_once(bob: wsfed.Worker) -> None:
    x = bob.send(torch.arange(3))
    kept = [x.gather(0, bob.send(OUT_OF_BOUNDS)), x.view(3).index_select(0, bob.send(-x))]
    for op in ("gather", "index_select"):
        with pytest.raises(wsfed.RemoteError, match=op):
            await bob.flush()
    await bob.flush()
    for each in kept:  # what was told of is still not there
        with pytest.raises(wsfed.RemoteError):
            await each.get()


async def test_a_failure_of_a_command_without_a_result_is_raised_by_the_next_await(
    bob: wsfed.Worker,
) -> None:
    x = bob.send(torch.ones(2))
    make_pointer(bob.link, 4000, (2,), torch.float32).tag("#lost")
    with pytest.raises(wsfed.NotFound, match="no object 4000"):
        await x.get()
    assert torch.equal(await x.get(), torch.ones(2))


async def test_failures_that_nobody_saw_are_logged_at_the_end(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "wsfed.client")
    async with wsfed.connect(url) as worker:
        bad = [worker.send(torch.arange(3)).gather(0, worker.send(OUT_OF_BOUNDS)) for _ in range(3)]
        await worker.send(torch.ones(1)).get()
    del bad
    (record,) = caplog.records
    assert "never awaited" in record.message
    assert "gather" in record.message
    assert "(and 2 more failures)" in record.message


async def test_a_wrong_line_is_refused_before_anything_is_sent(
    bob: wsfed.Worker, recorder: testing.Recorder
) -> None:
    x, y = bob.send(torch.ones(2, 3)), bob.send(torch.ones(2, 3))
    await bob.flush()
    before = len(recorder.frames)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        x @ y
    await asyncio.sleep(0)
    assert not [data for way, data in recorder.frames[before:] if way == "sent" and len(data) > 60]


# --- ends ----------------------------------------------------------------------------------------


async def test_closing_answers_whoever_waits(url: str) -> None:
    worker = await wsfed.connect(url)
    pointer = worker.send(torch.ones(2))
    asked = [pointer.get(), worker.flush(), worker.search("#x"), worker.dataset("rows")]
    await worker.close()
    for each in asked:
        with pytest.raises(wsfed.ConnectionLost, match="closed by this program"):
            await each
    for late in (pointer.get, lambda: pointer + 1, lambda: worker.send(torch.ones(1))):
        with pytest.raises(wsfed.ConnectionLost, match="closed by this program"):
            late()
    assert worker.closed
    assert "(closed)" in repr(worker)
    await worker.close()


async def test_closing_ends_every_task(url: str) -> None:
    async with wsfed.connect(url) as worker:
        pointer = worker.send(torch.ones(2))
        moved = pointer.move(worker)
        await moved.get()
    for task in asyncio.all_tasks():
        assert f"wsfed {url}" != task.get_name()


async def test_a_lost_connection_is_one_error_for_all_that_wait() -> None:
    async def open_wire() -> testing.Wire:
        near, far = testing.memory_wires()
        await far.close("pulled out")
        return near

    connection = Connection("test:", open_wire, asyncio.get_running_loop(), reconnect=0)
    worker = wsfed.Worker("eve", connection)
    asked = [worker.flush(), worker.send(torch.ones(1)).get(), worker.search()]
    connection.start()
    for each in asked:
        with pytest.raises(wsfed.ConnectionLost, match="pulled out") as caught:
            await each
        assert caught.value.url == "test:"
    await worker.close()


async def test_commands_given_before_the_connection_is_made_are_run(url: str) -> None:
    gate = asyncio.Event()

    async def open_wire() -> testing.Wire:
        await gate.wait()
        return await testing.dial(url)

    connection = Connection(url, open_wire, asyncio.get_running_loop())
    worker = wsfed.Worker("bob", connection)
    connection.start()
    asked = (worker.send(torch.ones(2)) + 1).get()
    gate.set()
    assert torch.equal(await asked, torch.full((2,), 2.0))
    await worker.close()


async def test_a_connection_that_cannot_be_made_again_is_given_up_in_time(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_BACK_OFF", (0.001, 0.01))
    tried = 0

    async def open_wire() -> testing.Wire:
        nonlocal tried
        tried += 1
        if tried > 1:
            raise testing.WireLost("the cable is cut")
        return testing.FaultyWire(await testing.dial(url), 4)

    async with testing.worker_over(open_wire, reconnect=0.2) as worker:
        asked = [worker.send(torch.ones(100_000)).get() for _ in range(5)]
        for each in asked:
            with pytest.raises(wsfed.ConnectionLost, match="the cable is cut"):
                await each
    assert tried > 2


async def test_many_attempts_do_not_overflow_the_back_off(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_BACK_OFF", (1e-9, 1e-9))
    tried = 0

    async def open_wire() -> testing.Wire:
        nonlocal tried
        tried += 1
        if 1 < tried < 1200:
            raise testing.WireLost("not yet")
        wire = await testing.dial(url)
        return testing.FaultyWire(wire, 4) if tried == 1 else wire

    async with testing.worker_over(open_wire, reconnect=60) as worker:
        x = worker.send(torch.ones(100_000))
        assert torch.equal(await (x + 1).get(), torch.full((100_000,), 2.0))


async def test_connecting_may_be_cancelled(url: str) -> None:
    async def never() -> testing.Wire:
        await asyncio.Event().wait()
        raise AssertionError

    connection = Connection("test:", never, asyncio.get_running_loop())
    worker = wsfed.Worker("eve", connection)
    connection.start()
    task = asyncio.ensure_future(wsfed.client.worker.Connecting(worker, connection)._open())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.closed


async def test_an_error_in_the_program_still_ends_the_session() -> None:
    async with wsfed.Node("bob") as node, node.listen() as url:
        with pytest.raises(KeyError):
            async with wsfed.connect(url) as worker:
                await worker.flush()
                assert node.info["sessions"] == 1
                raise KeyError
        while node.info["sessions"]:
            await asyncio.sleep(0)


async def test_a_blocking_call_within_the_loop_is_refused_and_does_not_hang() -> None:
    async def unused() -> None:
        raise AssertionError

    loop = asyncio.get_running_loop()
    connection = Connection("test:", testing.memory_wires, loop, blocking=True)  # type: ignore[arg-type]
    with pytest.raises(wsfed.ProtocolError, match="blocking call inside the event loop"):
        connection.run(unused())


# --- the handle ----------------------------------------------------------------------------------


async def test_a_worker_has_the_name_it_is_given_or_its_own(url: str) -> None:
    async with wsfed.connect(url) as own, wsfed.connect(url, id="left") as given:
        assert (own.id, given.id) == ("bob", "left")
        assert given.info["id"] == "bob"
        assert "left" in repr(given) and url in repr(given)


async def test_a_worker_tells_what_it_is_and_that_cannot_be_changed(bob: wsfed.Worker) -> None:
    assert bob.info["device"] == "cpu"
    assert bob.info["torch"] == torch.__version__
    assert bob.info["datasets"] == {}
    with pytest.raises(TypeError):
        bob.info["device"] = "cuda"  # type: ignore[index]


async def test_numbers_drawn_follow_the_seed(bob: wsfed.Worker) -> None:
    torch.manual_seed(3)
    expected = torch.bernoulli(torch.full((40,), 0.5))
    for _ in range(2):
        bob.manual_seed(3)
        drawn = torch.bernoulli(bob.send(torch.full((40,), 0.5)))
        assert torch.equal(await drawn.get(), expected)  # type: ignore[attr-defined]


async def test_an_answer_that_is_larger_than_a_frame_fails_and_says_so(bob: wsfed.Worker) -> None:
    text = "x" * limits.MAX_TEXT
    kept = [bob.send(torch.ones(1)).tag("#all").describe(text) for _ in range(80)]
    with pytest.raises(wsfed.RemoteError, match="bytes is above"):
        await bob.search("#all")
    assert torch.equal(await kept[0].get(), torch.ones(1))


async def test_a_connection_that_is_not_awaited_says_so(url: str) -> None:
    connecting = wsfed.connect(url)
    with pytest.raises(AttributeError, match=r"write worker = await wsfed.connect\(url\)"):
        connecting.send(torch.ones(1))  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="not Connecting; await it first"):
        wsfed.send(torch.ones(1), connecting)
    await (await connecting).close()


@pytest.mark.parametrize("world", ["async", "blocking"])
async def test_a_program_that_ends_without_closing_says_goodbye(world: str) -> None:
    program = {"async": ASYNC_WORLD, "blocking": BLOCKING_WORLD}[world]
    async with wsfed.Node("bob") as node, node.listen() as url, asyncio.timeout(60):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, url)
        assert await process.wait() == 0
        while node.info["sessions"]:
            await asyncio.sleep(0)


ASYNC_WORLD = """
import asyncio, sys, torch, wsfed
async def main():
    worker = await wsfed.connect(sys.argv[1])
    await worker.send(torch.ones(1))
asyncio.run(main())
"""
BLOCKING_WORLD = """
import sys, torch
from wsfed import sync
worker = sync.connect(sys.argv[1])
worker.send(torch.ones(1)).get()
"""


async def test_every_result_of_a_loop_comes_without_a_round_trip_a_step(
    bob: wsfed.Worker, recorder: testing.Recorder
) -> None:
    x = bob.send(torch.zeros(3))
    await bob.flush()
    recorder.frames.clear()
    told: list[float] = []
    asked = []
    for _ in range(50):
        x = x + 1.0
        asked.append(x.sum().get())
        asked[-1].add_done_callback(lambda done: told.append(float(done.result())))
    await asyncio.gather(*asked)
    assert told == [3.0 * step for step in range(1, 51)]
    assert recorder.round_trips <= 2
