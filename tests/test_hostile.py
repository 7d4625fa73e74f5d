"""Bad input gets one typed error, loses nothing, and the worker serves the next client."""

from __future__ import annotations

import asyncio
import json
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import torch
import websockets
from torch import nn
from websockets.typing import Subprotocol

import wsfed
from wsfed.pointers.pointer import make_pointer
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import decode, encode, pack
from wsfed.tensors import outgoing
from wsfed.transport.wire import SUBPROTOCOL

HELLO = m.Hello(m.VERSION, None, None, "stranger")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with wsfed.Node("bob") as node, node.listen() as where:
        yield where
        # Whatever happened: the next client is served.
        async with wsfed.connect(where) as worker:
            assert torch.equal(await worker.send(torch.ones(2)).get(), torch.ones(2))


def frame(seq: int, *raw: object, table: object = (), tail: bytes = b"") -> bytes:
    header = msgpack.packb([seq, 0, list(raw), list(table)])  # type: ignore[call-overload]
    head = struct.pack("<I", len(header)) + header
    return head + (bytes(-len(head) % 16) + tail if table else tail)


def control(message: m.Message) -> bytes:
    return b"".join(encode(0, 0, [pack(message.wire())]))


async def refusal(url: str, *data: bytes | str, greet: bool = True) -> m.Refused:
    """What the worker says to a peer that sends this."""
    async with websockets.connect(
        url, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None, max_size=None
    ) as socket:
        if greet:
            await socket.send(control(HELLO))
            assert isinstance(await message_of(socket), m.Welcome)
        for each in data:
            await socket.send(each)
        while True:
            answer = await message_of(socket)
            if isinstance(answer, m.Refused):
                return answer


async def message_of(socket: websockets.ClientConnection) -> m.Message:
    data = await socket.recv()
    assert isinstance(data, bytes)
    return m.parse(decode(data).messages[0], (m.CONTROL, m.REPLIES))


HEADER = msgpack.packb([1, 0, [m.Flush(1).wire()], []])
ONE = [["float32", [2], 0, 8]]
BAD: dict[str, tuple[bytes | str, str, str]] = {
    "a text frame": ("hello", "text", "only binary"),
    "an empty frame": (b"", "malformed", "at least 4 bytes"),
    "truncated msgpack": (struct.pack("<I", 5) + HEADER[:5], "malformed", "not msgpack"),
    "trailing msgpack": (
        struct.pack("<I", len(HEADER) + 1) + HEADER + b"\x00",
        "malformed",
        "not msgpack",
    ),
    "trailing bytes": (frame(1, m.Flush(1).wire(), tail=b"more"), "malformed", "4 came"),
    "100,000 nested arrays": (
        struct.pack("<I", 100_001) + b"\x91" * 100_000 + b"\xc0",
        "malformed",
        "not msgpack",
    ),
    "a length bomb": (struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff", "malformed", "not msgpack"),
    "a length bomb of a map": (struct.pack("<I", 5) + b"\xdf\xff\xff\xff\xff", "malformed", ""),
    "a length bomb of bytes": (struct.pack("<I", 5) + b"\xc6\xff\xff\xff\xff", "malformed", ""),
    "a length bomb of text": (struct.pack("<I", 5) + b"\xdb\xff\xff\xff\xff", "malformed", ""),
    "an extension type": (struct.pack("<I", 3) + b"\xd4\x01\x00", "malformed", "not msgpack"),
    "text that is none": (struct.pack("<I", 3) + b"\xa2\xff\xff", "malformed", "not msgpack"),
    "a header longer than the frame": (struct.pack("<I", 2**32 - 1), "malformed", "does not fit"),
    "an unknown command": (frame(1, [999]), "unknown-message", "no message 999"),
    "a reply": (frame(1, m.ValueReply(1, None).wire()), "unexpected", "not expected here"),
    "a missing field": (frame(1, [33, "torch.add"]), "malformed", "Execute has 5 fields"),
    "a wrongly typed field": (frame(1, [35, 1, "x"]), "malformed", "Get.id has to be"),
    "an identifier of nothing": (frame(1, [35, 1, 0]), "malformed", "Get.id has to be"),
    "a truth for a number": (frame(1, [35, True, 1]), "malformed", "Get.request has to be"),
    "a number beyond 53 bits": (frame(1, [35, 1, 2**53]), "malformed", "Get.id has to be"),
    "an acknowledgement of what was not sent": (
        b"".join(encode(0, 99, [pack(m.Ack().wire())])),
        "ack",
        "",
    ),
    "a second hello": (control(HELLO), "unexpected", "Hello is not expected here"),
    "a gap": (frame(7, m.Flush(1).wire()), "gap", "where 1 was due"),
    "bytes that do not match the shape": (
        frame(1, [32, 1, 0, False, False], table=[["float32", [3], 0, 8]], tail=bytes(16)),
        "tensor-size",
        "has not the 8 bytes",
    ),
    "segments that are not there": (
        frame(1, [32, 1, 0, False, False], table=ONE),
        "malformed",
        "the segments need 16 bytes",
    ),
    "a dtype that does not exist": (
        frame(1, [32, 1, 0, False, False], table=[["float33", [2], 0, 8]], tail=bytes(16)),
        "unknown-dtype",
        "no dtype 'float33'",
    ),
    "a tensor that is not in the table": (
        frame(1, [32, 1, 5, False, False], table=ONE, tail=bytes(16)),
        "malformed",
        "not in the frame",
    ),
    "a chunk of no stream": (
        frame(1, [17, 1, 0, 0], table=[["uint8", [4], 0, 4]], tail=bytes(16)),
        "stream",
        "not open",
    ),
    "a stream of a petabyte": (frame(1, [16, 1, 2**50]), "tensor-size", "too large"),
    "a tensor of a stream that never came": (
        frame(1, [32, 1, 0, False, False], table=[["float32", [2], -3, 8]]),
        "stream",
        "has not these",
    ),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_peer_that_breaks_the_rules_is_told_which(url: str, what: str) -> None:
    data, error, reason = BAD[what]
    refused = await refusal(url, data)
    assert refused.error == error
    assert reason in refused.reason


async def test_an_unknown_version_is_refused_with_advice(url: str) -> None:
    refused = await refusal(url, control(m.Hello(99, None, None, "")), greet=False)
    assert refused.error == "version"
    assert "install the same release" in refused.reason


async def test_a_connection_begins_with_a_greeting(url: str) -> None:
    assert (await refusal(url, frame(1, [40, 1]), greet=False)).error == "unexpected"


async def test_a_message_above_the_limit_ends_the_connection(url: str) -> None:
    async with websockets.connect(
        url, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None
    ) as socket:
        await socket.send(control(HELLO))
        await socket.send(bytes(limits.MAX_FRAME_BYTES + 1))
        with pytest.raises(websockets.ConnectionClosed):
            while True:
                await socket.recv()


async def executed(url: str, op: str, *args: Any) -> wsfed.RemoteError:
    async with wsfed.connect(url) as worker:
        id = worker.link.new_id()
        worker.link.issue(m.Execute(op, [id], list(args), {}, 0).wire())
        with pytest.raises(wsfed.RemoteError) as caught:
            await make_pointer(worker.link, id, (), torch.float32).get()
        assert (await worker.send(torch.ones(())).get()).item() == 1, "the session lives on"
    return caught.value


@pytest.mark.parametrize(
    "op",
    [
        "torch.os.system",
        "torch.load",
        "__class__",
        "torch.Tensor.__class__",
        "torch.hub.load",
        "os.system",
        "",
        "torch.Tensor.apply_",
        "torch.Tensor.data_ptr",
        "torch.empty_like",
    ],
)
async def test_only_the_table_is_run(url: str, op: str) -> None:
    error = await executed(url, op, "echo")
    assert isinstance(error, wsfed.OpNotAllowed)
    assert error.op == op


async def test_an_argument_that_is_none_fails_its_own_command_only(url: str) -> None:
    nested: list[Any] = [1]
    for _ in range(200):
        nested = [1, nested]
    for argument in ([99], [0], [0, "x"], ["os"], [6, "float33"], [7, "cuda:0"], nested, {"a": 1}):
        error = await executed(url, "torch.abs", argument)
        assert error.type in ("RemoteProtocolError", "OpNotAllowed"), argument


async def test_get_of_a_deleted_or_foreign_object_is_not_found(url: str) -> None:
    async with wsfed.connect(url) as worker, wsfed.connect(url) as other:
        kept = [other.send(torch.full((2,), float(n))) for n in range(20)]
        await other.flush()
        gone = worker.send(torch.ones(2))
        id = gone.id_at_location
        worker.link.issue(m.Delete([id]).wire())
        for stray in (id, kept[-1].id_at_location):
            with pytest.raises(wsfed.NotFound, match=f"no object {stray}"):
                await make_pointer(worker.link, stray, (2,), torch.float32).get()


async def test_an_operation_across_two_workers_names_both_and_the_line(url: str) -> None:
    async with wsfed.connect(url, id="left") as left, wsfed.connect(url, id="right") as right:
        with pytest.raises(wsfed.NotCollocated, match=r"'left' and 'right'.*test_hostile\.py:\d+"):
            left.send(torch.ones(2)) + right.send(torch.ones(2))


# --- workers that misbehave -----------------------------------------------------------------------

Behaviour = Callable[[websockets.ServerConnection], Awaitable[None]]


@asynccontextmanager
async def serving(behaviour: Behaviour) -> AsyncIterator[str]:
    """The URL of a server that behaves like this, and then waits."""

    async def serve(socket: websockets.ServerConnection) -> None:
        try:
            await behaviour(socket)
        except websockets.ConnectionClosed:
            pass

    async with websockets.serve(
        serve, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None
    ) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


async def answers_garbage(socket: websockets.ServerConnection) -> None:
    await socket.recv()
    await socket.send(b"\xff" * 20)


async def answers_text(socket: websockets.ServerConnection) -> None:
    await socket.recv()
    await socket.send("welcome")


async def answers_with_a_command(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(frame(1, [40, 1]))


async def leaves_a_gap(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(frame(9, m.ValueReply(1, None).wire()))


async def claims_what_was_not_sent(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(b"".join(encode(0, 77, [pack(m.Ack().wire())])))


async def replies_without_a_tensor(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(frame(1, m.TensorReply(1, 3, False).wire()))


async def welcome(socket: websockets.ServerConnection) -> None:
    await socket.recv()
    await socket.send(control(m.Welcome(b"s" * 16, b"t" * 16, b"e" * 16, "eve", {})))
    await socket.recv()


async def welcomes_with_wrong_types(socket: websockets.ServerConnection) -> None:
    await socket.recv()
    await socket.send(frame(0, [m.Welcome.code, "s", 1, None, "eve", []]))


async def sends_an_unknown_message(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(frame(1, [999, 1]))


async def replies_with_wrong_types(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(frame(1, [m.TensorReply.code, "one", 0, False]))


async def sends_a_frame_above_the_limit(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(bytes(limits.MAX_FRAME_BYTES + 1))


async def opens_a_stream_of_a_petabyte(socket: websockets.ServerConnection) -> None:
    await welcome(socket)
    await socket.send(frame(1, m.OpenStream(1, 2**50).wire()))


@pytest.mark.parametrize(
    "behaviour",
    [
        answers_garbage,
        answers_text,
        answers_with_a_command,
        leaves_a_gap,
        claims_what_was_not_sent,
        replies_without_a_tensor,
        welcomes_with_wrong_types,
        sends_an_unknown_message,
        replies_with_wrong_types,
        sends_a_frame_above_the_limit,
        opens_a_stream_of_a_petabyte,
    ],
    ids=lambda behaviour: behaviour.__name__,
)
async def test_a_worker_that_breaks_the_rules_ends_the_session_and_nothing_hangs(
    behaviour: Behaviour,
) -> None:
    async def misbehave(socket: websockets.ServerConnection) -> None:
        await behaviour(socket)
        await socket.wait_closed()

    async with serving(misbehave) as url:
        with pytest.raises(wsfed.RemoteProtocolError):
            async with wsfed.connect(url) as worker:
                await worker.flush()


async def test_a_worker_that_closes_at_once_is_lost() -> None:
    async with serving(welcome) as url:
        with pytest.raises(wsfed.ConnectionLost):
            async with wsfed.connect(url, reconnect=0) as worker:
                await worker.flush()


async def test_a_worker_that_never_answers_a_greeting_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 0.2)

    async def never(socket: websockets.ServerConnection) -> None:
        await socket.wait_closed()

    async with serving(never) as url:
        with pytest.raises(wsfed.ConnectionLost, match="nothing came"):
            await wsfed.connect(url)


@pytest.mark.parametrize("answers", [True, False])
async def test_a_worker_that_never_resumes_a_session_is_given_up(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 0.1)
    begun = 0

    async def closes(socket: websockets.ServerConnection) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            await welcome(socket)
        elif not answers:
            await socket.wait_closed()

    async with serving(closes) as url, wsfed.connect(url, reconnect=0.3) as worker:
        pointer = worker.send(torch.ones(2))
        for asked in (pointer.get(), worker.flush()):
            with pytest.raises(wsfed.ConnectionLost, match=r"worker '.*' at .* is lost: .* anew$"):
                await asked
    assert begun > 1


def says(*replies: m.Message, tensors: Any = ()) -> Behaviour:
    async def behave(socket: websockets.ServerConnection) -> None:
        await welcome(socket)
        await socket.send(b"".join(encode(1, 0, [pack(r.wire()) for r in replies], tensors)))
        await socket.wait_closed()

    return behave


@pytest.mark.parametrize(
    "answer",
    [
        m.ValueReply(2, "a text"),
        m.ValueReply(2, None),
        m.TensorReply(2, 0, True),  # whole numbers that are said to require a gradient
    ],
    ids=["a text", "nothing", "a gradient of whole numbers"],
)
async def test_an_answer_that_is_not_the_value_asked_for_is_a_protocol_error(
    answer: m.Message,
) -> None:
    other = [outgoing(torch.arange(5))] if isinstance(answer, m.TensorReply) else []
    async with serving(says(answer, tensors=other)) as url:
        with pytest.raises(wsfed.RemoteProtocolError):
            async with wsfed.connect(url) as worker:
                pointer = worker.send(torch.ones(2))
                await pointer.get()


FIELD = ["x", "float32", [3, 2]]


@pytest.mark.parametrize(
    "described",
    [
        None,
        5,
        [],
        {},
        {"name": "rows", "rows": "many", "open": True, "fields": [FIELD]},
        {"name": "rows", "rows": -1, "open": True, "fields": [FIELD]},
        {"name": "rows", "rows": 3, "open": True, "fields": [["x", "float33", [3]]]},
        {"name": "rows", "rows": 3, "open": True, "fields": [["x", "float32", ["3"]]]},
        {"name": "rows", "rows": 3, "open": True, "fields": [["x", "float32"]]},
        {"name": "rows", "rows": 3, "open": True, "fields": 7},
    ],
    ids=str,
)
async def test_a_data_set_that_is_none_is_a_protocol_error(described: Any) -> None:
    async with serving(says(m.ValueReply(1, described))) as url:
        with pytest.raises(wsfed.RemoteProtocolError):
            async with wsfed.connect(url) as worker:
                await worker.dataset("rows")


@pytest.mark.parametrize(
    "found",
    [None, "all", {}, {"objects": 3, "datasets": []}, {"objects": [{"id": "x"}], "datasets": []}],
    ids=str,
)
async def test_a_search_that_finds_nonsense_is_a_protocol_error(found: Any) -> None:
    async with serving(says(m.ValueReply(1, found))) as url:
        with pytest.raises(wsfed.RemoteProtocolError):
            async with wsfed.connect(url) as worker:
                await worker.search("#data")


async def test_a_device_that_does_not_exist_is_a_protocol_error() -> None:
    async def behave(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        info = {"device": "warp:9"}
        await socket.send(control(m.Welcome(b"s" * 16, b"t" * 16, b"e" * 16, "eve", info)))
        await socket.wait_closed()

    async with serving(behave) as url:
        with pytest.raises(wsfed.RemoteProtocolError, match="warp"):
            await wsfed.connect(url)


async def test_replies_that_nobody_asked_for_change_nothing() -> None:
    strays = (m.ValueReply(77, 1), m.TensorReply(78, 0, False), m.ValueReply(1, None))
    async with (
        serving(says(*strays, tensors=[outgoing(torch.ones(1))])) as url,
        wsfed.connect(url) as worker,
    ):
        await worker.flush()


@pytest.mark.processes
async def test_a_worker_killed_in_the_middle_of_a_step_is_reported_once_and_by_all() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wsfed", "worker", "--port", "0", "--json"),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    url = json.loads(await process.stdout.readline())["url"]
    async with wsfed.connect(url, reconnect=0.3) as bob:
        model = bob.send(nn.Linear(200, 200))
        x = bob.send(torch.randn(200, 200))
        await bob.flush()
        for _ in range(300):
            x = model(x)
        loss = x.sum()
        loss.backward()
        asked = [loss.get(), bob.flush(), wsfed.get(model)]
        await asyncio.sleep(0)
        process.kill()
        for each in asked:
            with pytest.raises(wsfed.ConnectionLost):
                await each
        with pytest.raises(wsfed.ConnectionLost):
            x + 1
    await process.wait()


@pytest.mark.processes
async def test_a_port_in_use_is_said_with_advice(url: str) -> None:
    port = url.rsplit(":", 1)[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wsfed", "worker", "--port", port), stderr=subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"try --port 0" in said


@pytest.mark.parametrize(
    "tensor", [torch.ones(3), torch.ones(2, dtype=torch.float64)], ids=["shape", "dtype"]
)
async def test_a_tensor_that_is_not_the_one_asked_for_is_a_protocol_error(
    tensor: torch.Tensor,
) -> None:
    async with serving(says(m.TensorReply(2, 0, False), tensors=[outgoing(tensor)])) as url:
        with pytest.raises(wsfed.RemoteProtocolError, match=r"where a float32\[2\] was asked for"):
            async with wsfed.connect(url) as worker:
                await worker.send(torch.ones(2)).get()


@pytest.mark.parametrize("wrong", [{"dtype": "float33"}, {"stride": None}, {"stride": []}], ids=str)
async def test_a_description_that_is_none_is_a_protocol_error(wrong: dict[str, Any]) -> None:
    described = {"dtype": "float32", "shape": [2], "stride": [1]} | wrong
    described |= {"requires_grad": False, "is_leaf": True, "tags": [], "description": ""}
    async with serving(says(m.ValueReply(2, described))) as url:
        with pytest.raises(wsfed.RemoteProtocolError):
            async with wsfed.connect(url) as worker:
                await worker.send(torch.ones(2)).resolve()
