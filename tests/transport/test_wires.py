"""Every wire carries whole binary messages in order until it is lost."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import websockets

from tests.certificates import tls
from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.transport.memory import pair
from wsfed.transport.websocket import WebSocketWire, dial, is_loopback, listen
from wsfed.transport.wire import SUBPROTOCOL, Wire, WireLost

Ends = AbstractAsyncContextManager[tuple[Wire, Wire]]


@asynccontextmanager
async def memory_ends() -> AsyncIterator[tuple[Wire, Wire]]:
    yield pair()


@asynccontextmanager
async def socket_ends() -> AsyncIterator[tuple[Wire, Wire]]:
    accepted: asyncio.Queue[WebSocketWire] = asyncio.Queue()
    done = asyncio.Event()

    async def serve(wire: WebSocketWire) -> None:
        accepted.put_nowait(wire)
        await done.wait()

    async with listen(serve, host="127.0.0.1", port=0) as (host, port):
        near = await dial(f"ws://{host}:{port}")
        try:
            yield near, await accepted.get()
        finally:
            done.set()
            await near.close()


@pytest.fixture(params=[memory_ends, socket_ends], ids=["memory", "websocket"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Wire, Wire]]:
    make: Callable[[], Ends] = request.param
    async with make() as both:
        yield both


async def test_messages_arrive_whole_and_in_order(ends: tuple[Wire, Wire]) -> None:
    near, far = ends
    sent = [[b"a", b"b"], [memoryview(b"cd")], [b"", bytes(300_000)]]
    for message in sent:
        await near.send(message)
    for message in sent:
        assert bytes(await far.receive()) == b"".join(message)


async def test_a_closed_wire_is_lost_to_both_sides(ends: tuple[Wire, Wire]) -> None:
    near, far = ends
    await near.close("enough")
    with pytest.raises(WireLost, match="enough"):
        await far.receive()
    with pytest.raises(WireLost):
        await near.send([b"x"])
    await near.close()


async def test_a_sender_waits_for_a_reader_that_is_slow(ends: tuple[Wire, Wire]) -> None:
    near, far = ends
    message = [bytes(limits.CHUNK_BYTES)]
    sent = 0

    async def flood() -> None:
        nonlocal sent
        for _ in range(200):
            await near.send(message)
            sent += 1

    task = asyncio.create_task(flood())
    for _ in range(200):
        await asyncio.sleep(0)
    assert sent < 100, "at most what the two ends buffer"
    for _ in range(200):
        await far.receive()
    await task
    assert sent == 200


async def test_a_text_frame_is_refused() -> None:
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def serve(wire: WebSocketWire) -> None:
        try:
            await wire.receive()
        except RemoteProtocolError as error:
            errors.put_nowait(error)

    async with (
        listen(serve, host="127.0.0.1", port=0) as (host, port),
        websockets.connect(f"ws://{host}:{port}", subprotocols=[SUBPROTOCOL]) as socket,  # type: ignore[list-item]
    ):
        await socket.send("hello")
        assert "only binary" in str(await errors.get())


async def test_a_message_above_the_limit_is_refused_as_such() -> None:
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def serve(wire: WebSocketWire) -> None:
        try:
            await wire.receive()
        except Exception as error:
            errors.put_nowait(error)

    async with listen(serve, host="127.0.0.1", port=0) as (host, port):
        near = await dial(f"ws://{host}:{port}")
        with pytest.raises(WireLost):
            await near.send([bytes(limits.MAX_FRAME_BYTES + 1)])
            await near.receive()
        error = await errors.get()
        assert isinstance(error, RemoteProtocolError) and error.code == "frame-size"
        await near.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "ws://", "nonsense"])
async def test_what_is_no_url_of_a_worker_is_said_to_be_none(url: str) -> None:
    with pytest.raises(ValueError, match="write ws://host:port"):
        await dial(url)


async def test_a_refused_connection_asks_whether_a_worker_runs() -> None:
    async def serve(wire: WebSocketWire) -> None:
        raise AssertionError

    async with listen(serve, host="127.0.0.1", port=0) as (host, port):
        pass  # now the port is free
    with pytest.raises(WireLost, match="is a worker running there"):
        await dial(f"ws://{host}:{port}")


async def test_a_server_of_another_kind_is_told_apart() -> None:
    async def echo(socket: websockets.ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with websockets.serve(echo, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        with pytest.raises(WireLost):
            await dial(f"ws://127.0.0.1:{port}")


async def test_health_and_plain_http_are_answered() -> None:
    async def serve(wire: WebSocketWire) -> None:
        raise AssertionError

    async def ask(host: str, port: int, path: str) -> str:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer.decode()

    async with listen(serve, host="127.0.0.1", port=0, health=lambda: "ok bob") as (host, port):
        assert "200 OK" in (health := await ask(host, port, "/healthz")) and "ok bob" in health
        assert "wsfed.connect(url)" in await ask(host, port, "/")


async def test_a_client_of_another_protocol_is_told_which_one_is_spoken() -> None:
    async def serve(wire: WebSocketWire) -> None:
        raise AssertionError

    async with listen(serve, host="127.0.0.1", port=0) as (host, port):
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(f"ws://{host}:{port}")
    assert b"it speaks wsfed.1 only" in bytes(caught.value.response.body)


def test_loopback_is_known_from_other_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "::")))


async def test_tls_and_no_tls_are_told_apart() -> None:
    async def serve(wire: WebSocketWire) -> None:
        raise AssertionError

    async with listen(serve, host="127.0.0.1", port=0) as (host, port):
        with pytest.raises(WireLost, match="is it ws://"):
            await dial(f"wss://{host}:{port}")
        with pytest.raises(ValueError, match="is it wss://"):
            await dial(f"ws://{host}:{port}", ssl=ssl.create_default_context())


async def test_a_certificate_that_is_not_trusted_says_what_to_give(
    tmp_path: Path,
) -> None:
    async def serve(wire: WebSocketWire) -> None:
        await wire.close()

    there, here = tls(tmp_path)
    async with listen(serve, host="127.0.0.1", port=0, ssl=there) as (host, port):
        with pytest.raises(WireLost, match=r"not trusted .*cafile="):
            await dial(f"wss://{host}:{port}")
        with pytest.raises(WireLost, match="is it wss://"):
            await dial(f"ws://{host}:{port}")
        await (await dial(f"wss://{host}:{port}", ssl=here)).close()
