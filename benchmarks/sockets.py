"""The floor: what websockets and the machine give, without wsfed, between two processes."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection

__all__ = ["bulk", "delayed", "echo", "serving", "tensor"]

_PIECE: Final = 256 * 1024
_SMALL: Final = 64


async def _answer(socket: ServerConnection) -> None:
    """Small messages come back, large ones are thrown away; words ask for more."""
    async for message in socket:
        if isinstance(message, str):
            word, nbytes = message.split()
            if word == "send":
                await _send(socket, memoryview(bytes(_PIECE)), int(nbytes) // _PIECE)
            else:
                kept = await _receive(socket, int(nbytes))
                await socket.send("kept")
                await _send(socket, memoryview(bytes(kept)))
        elif len(message) <= _SMALL:
            await socket.send(message)


async def _send(socket: Connection, data: memoryview, times: int = 1) -> None:
    for _ in range(times):
        for start in range(0, len(data), _PIECE):
            await socket.send(data[start : start + _PIECE])


async def _receive(socket: Connection, nbytes: int) -> memoryview:
    """So many bytes, each piece copied to where it belongs."""
    kept, place = memoryview(bytearray(nbytes)), 0
    while place < nbytes:
        piece = await socket.recv(decode=False)
        kept[place : place + len(piece)] = piece
        place += len(piece)
    return kept


async def _serve() -> None:
    async with websockets.serve(_answer, "127.0.0.1", 0, compression=None, max_queue=4) as server:
        sys.stdout.write(f"{next(iter(server.sockets)).getsockname()[1]}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)  # until who started this has ended


@asynccontextmanager
async def serving() -> AsyncIterator[ClientConnection]:
    """A connection to a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.sockets"), stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        async with websockets.connect(f"ws://127.0.0.1:{port}", compression=None) as socket:
            yield socket
    finally:
        process.stdin.close()
        await process.wait()


async def echo(socket: ClientConnection, count: int = 300) -> float:
    """Seconds of one round trip of a small message."""
    begun = time.perf_counter()
    for _ in range(count):
        await socket.send(b"hello")
        await socket.recv()
    return (time.perf_counter() - begun) / count


async def bulk(socket: ClientConnection, nbytes: int) -> tuple[float, float]:
    """Seconds for so many bytes there and for so many back, thrown away as they come."""
    begun = time.perf_counter()
    await _send(socket, memoryview(bytes(_PIECE)), nbytes // _PIECE)
    await echo(socket, 1)
    up = time.perf_counter() - begun
    begun = time.perf_counter()
    await socket.send(f"send {nbytes}")
    for _ in range(nbytes // _PIECE):
        await socket.recv()
    return up, time.perf_counter() - begun


async def tensor(socket: ClientConnection, nbytes: int) -> tuple[float, float]:
    """The same for bytes that may change behind the sender's back and are there afterwards:
    copied before the first piece leaves, and put together in memory of their own.
    """
    data = bytearray(nbytes)
    begun = time.perf_counter()
    await socket.send(f"keep {nbytes}")
    await _send(socket, memoryview(bytes(data)))
    await socket.recv()
    up = time.perf_counter() - begun
    begun = time.perf_counter()
    await _receive(socket, nbytes)
    return up, time.perf_counter() - begun


@asynccontextmanager
async def delayed(port: int, seconds: float) -> AsyncIterator[int]:
    """A port that leads to another one, every byte later by ``seconds`` each way."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            delivering = group.create_task(deliver())
            while data := await reader.read(1 << 20):
                waiting.put_nowait((time.perf_counter() + seconds, data))
            delivering.cancel()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, back), carry(there, writer), return_exceptions=True)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


if __name__ == "__main__":
    asyncio.run(_serve())
