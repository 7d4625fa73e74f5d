"""A worker within this process: the same bytes, the same rules, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from wsfed.client.background import background
from wsfed.client.connection import Connection
from wsfed.client.worker import Worker
from wsfed.node import Node
from wsfed.transport.memory import pair
from wsfed.transport.wire import Wire
from wsfed.worker.datasets import Dataset

if TYPE_CHECKING:
    from wsfed.privacy.roster import Membership
    from wsfed.worker.strict import Ledger

__all__ = ["VirtualWorker"]


class VirtualWorker(Worker):
    """A worker to try things with, and to test against.

    It needs no ``await`` to be made. Where an event loop runs it behaves as a worker of
    :func:`wsfed.connect`; elsewhere it is a blocking one, as of ``wsfed.sync``.

    Args:
        id: its name.
        datasets: what its owner offers.
        device: where its tensors are.
        max_memory: bytes that the tensors of the session may take.
        membership: in rounds of secure aggregation (:mod:`wsfed.privacy.roster`).
        ledger: makes it strict: nothing leaves but releases by its rules.
        blocking: which of the two it is to be, if not the one that fits.
    """

    def __init__(
        self,
        id: str,
        *,
        datasets: Iterable[Dataset] = (),
        device: str | torch.device = "cpu",
        max_memory: int | None = None,
        membership: Membership | None = None,
        ledger: Ledger | None = None,
        blocking: bool | None = None,
    ) -> None:
        if blocking is None:
            blocking = not _loop_is_running()
        self._node = Node(
            id,
            datasets=datasets,
            device=device,
            max_memory=max_memory,
            membership=membership,
            ledger=ledger,
        )
        self._serving: set[asyncio.Task[None]] = set()
        self._background = blocking
        self._loop = background.acquire() if blocking else asyncio.get_running_loop()
        connection = Connection(
            f"memory:{id}", self._open_wire, self._loop, blocking=blocking, reconnect=0
        )
        super().__init__(id, connection)
        connection.device = self._node.device
        if blocking:
            background.run(self._loop, self._start())
        else:
            connection.start()

    async def _start(self) -> None:
        self._connection.start()
        await self._connection.opened

    async def _open_wire(self) -> Wire:
        near, far = pair()
        task = asyncio.get_running_loop().create_task(self._node.serve(far))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return near

    def close(self) -> Any:
        """End the session; the worker forgets its objects. May be called twice."""
        if not self._connection.blocking:
            return super().close()
        if self._background:
            self._background = False
            try:
                super().close()
            finally:
                background.release()
        return None

    async def _end(self) -> None:
        await super()._end()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._node.join()

    def __enter__(self) -> VirtualWorker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
