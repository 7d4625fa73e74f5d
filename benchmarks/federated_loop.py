"""The floor: federated averaging as a bare loop over websockets, without wsfed.

``python -m benchmarks.federated_loop DATA.npz`` is its worker: it takes a state as raw bytes in
messages of 256 KiB, trains in plain torch, and sends the state back. The client averages in
float64. Nothing is checked, named, resumed or recorded.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import websockets
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection

from benchmarks.federated_tasks import mlp, program

__all__ = ["Bare", "bare_worker", "connected"]

_PIECE: Final = 256 * 1024
_NOTHING: Final = "-"


@dataclass(frozen=True, slots=True)
class Bare:
    """One round.

    Attributes:
        seconds: all of it.
        slowest: longest of one site, from the first byte to the last.
        training: longest that a worker trained.
        state: the mean.
    """

    seconds: float
    slowest: float
    training: float
    state: torch.Tensor


class Loop:
    """The client.

    Args:
        sockets: to the workers.
    """

    def __init__(self, sockets: Sequence[ClientConnection]) -> None:
        self._sockets = sockets

    async def round(self, state: torch.Tensor) -> Bare:
        """Send the state to all, and average what comes back."""
        begun = time.perf_counter()
        total = torch.zeros(len(state), dtype=torch.float64)
        told = await asyncio.gather(*(self._site(each, state, total) for each in self._sockets))
        mean = total.div_(len(self._sockets)).to(torch.float32)
        seconds = time.perf_counter() - begun
        return Bare(seconds, max(own for own, _ in told), max(train for _, train in told), mean)

    async def _site(
        self, socket: ClientConnection, state: torch.Tensor, total: torch.Tensor
    ) -> tuple[float, float]:
        begun = time.perf_counter()
        await _send(socket, state)
        training = json.loads(await socket.recv())
        total.add_(await _receive(socket, state.nbytes))
        return time.perf_counter() - begun, training


async def _send(socket: Any, state: torch.Tensor) -> None:
    raw = memoryview(state.numpy()).cast("B")
    for start in range(0, len(raw), _PIECE):
        await socket.send(raw[start : start + _PIECE])


async def _receive(socket: Any, nbytes: int) -> torch.Tensor:
    raw, got = bytearray(nbytes), 0
    while got < nbytes:
        piece = await socket.recv()
        raw[got : got + len(piece)] = piece
        got += len(piece)
    return torch.frombuffer(raw, dtype=torch.float32)


@contextmanager
def bare_worker(data: str = _NOTHING, values: int = 0) -> Iterator[dict[str, Any]]:
    """A worker process; gives its ``port`` and ``pid``.

    Args:
        data: rows to train on; without, nothing is trained.
        values: of the state, where nothing is trained.
    """
    with program("benchmarks.federated_loop", data, str(values)) as line:
        yield json.loads(line)


@asynccontextmanager
async def connected(ports: Sequence[int]) -> AsyncIterator[Loop]:
    """A client of the workers on these ports."""
    async with AsyncExitStack() as stack:
        sockets = [
            await stack.enter_async_context(
                websockets.connect(f"ws://127.0.0.1:{port}", compression=None)
            )
            for port in ports
        ]
        yield Loop(sockets)


# --- the worker -----------------------------------------------------------------------------------


def _trainer(path: str) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Number of values, and one local epoch over 32 rows a step."""
    with np.load(path, allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    model = mlp()
    parameters = list(model.parameters())

    def train(state: torch.Tensor) -> torch.Tensor:
        vector_to_parameters(state, parameters)
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return torch.cat([each.detach().flatten() for each in parameters])

    return sum(each.numel() for each in parameters), train


async def _serve(path: str, values: int) -> None:
    train: Callable[[torch.Tensor], torch.Tensor] = lambda state: state  # noqa: E731
    if path != _NOTHING:
        values, train = _trainer(path)

    async def rounds(socket: ServerConnection) -> None:
        while True:
            state = await _receive(socket, values * 4)
            begun = time.perf_counter()
            state = train(state)
            await socket.send(json.dumps(time.perf_counter() - begun))
            await _send(socket, state)

    async def serve(socket: ServerConnection) -> None:
        try:
            await rounds(socket)
        except websockets.ConnectionClosed:
            pass

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with websockets.serve(serve, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        sys.stdout.write(json.dumps({"port": port, "pid": os.getpid()}) + "\n")
        sys.stdout.flush()
        await ended.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
