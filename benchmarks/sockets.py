"""The floor: what websockets and the machine give, without wsfed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection

__all__ = ["bulk", "delayed", "echo", "serving"]

_PIECE = 256 * 1024


@asynccontextmanager
async def serving() -> AsyncIterator[ClientConnection]:
    """A server that answers small messages, swallows large ones, and sends as asked."""

    async def serve(socket: ServerConnection) -> None:
        async for message in socket:
            if isinstance(message, str):
                left, piece = int(message), bytes(_PIECE)
                while left > 0:
                    await socket.send(piece)
                    left -= _PIECE
            elif len(message) <= 64:
                await socket.send(message)

    async with (
        websockets.serve(serve, "127.0.0.1", 0, compression=None, max_queue=4) as server,
        websockets.connect(
            f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", compression=None
        ) as socket,
    ):
        yield socket


async def echo(socket: ClientConnection, count: int = 300) -> float:
    """Seconds of one round trip of a small message."""
    begun = time.perf_counter()
    for _ in range(count):
        await socket.send(b"hello")
        await socket.recv()
    return (time.perf_counter() - begun) / count


async def bulk(socket: ClientConnection, nbytes: int) -> tuple[float, float]:
    """Seconds for so many bytes there and for so many back, in messages of 256 KiB."""
    piece = bytes(_PIECE)
    begun = time.perf_counter()
    for _ in range(nbytes // _PIECE):
        await socket.send(piece)
    await socket.send(b"done")
    await socket.recv()
    up = time.perf_counter() - begun
    begun = time.perf_counter()
    await socket.send(str(nbytes))
    for _ in range(nbytes // _PIECE):
        await socket.recv()
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
