"""The handle of a worker: what a program holds instead of a socket."""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from collections.abc import Generator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

from wsfed.client.connection import Connection
from wsfed.client.dataset import RemoteDataset
from wsfed.pointers import modules, optimizers
from wsfed.pointers.pointer import Pointer, make_pointer
from wsfed.protocol import messages as m
from wsfed.tensors import DTYPES
from wsfed.transport.websocket import check_url, dial

__all__ = ["Connecting", "Worker", "connect"]

_Sendable = TypeVar("_Sendable")


class Worker:
    """A session on a worker. Made by :func:`connect`; an async context manager.

    In the blocking world (``wsfed.sync``) the methods that are awaited here return their result.
    """

    def __init__(self, id: str, connection: Connection) -> None:
        self._id = id
        self._connection = connection
        connection.worker = self
        optimizers.install()
        self._installed = True

    # --- who it is ---

    @property
    def id(self) -> str:
        """The worker's name: the one given to ``connect``, else the one it calls itself."""
        return self._id or str(self._connection.info.get("id", ""))

    @property
    def link(self) -> Connection:
        """The session behind this handle."""
        return self._connection

    @property
    def url(self) -> str:
        """Where it is."""
        return self._connection.url

    @property
    def info(self) -> Mapping[str, Any]:
        """What the worker told when it welcomed this client: device, versions, data sets …"""
        return MappingProxyType(self._connection.info)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent to the worker and received from it, by this session."""
        return self._connection.sent_bytes, self._connection.received_bytes

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; a session without one tries to get it back."""
        return self._connection.connected

    @property
    def closed(self) -> bool:
        """Whether the session is over."""
        return self._connection.closed

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else ""
        return f"<Worker {self.id!r} at {self.url}{state}>"

    # --- what it does ---

    def send(self, value: _Sendable) -> Any:
        """Send a tensor, a module, or a list, tuple or dict of them. Does not wait.

        A tensor gives a :class:`Pointer`; a module is sent in place and returned, its parameters
        and buffers now pointers.

        Raises:
            WsfedError: the session is over, or the value cannot be sent.
        """
        return modules.send(value, self._connection)

    def flush(self) -> Any:
        """Wait until everything before has run.

        Raises:
            RemoteError: the first failure that was not raised yet.
        """
        return self._connection.run(self._flush(self._ask(lambda n: m.Flush(n).wire())))

    async def _flush(self, asked: asyncio.Future[Any]) -> None:
        await asked
        error = self._connection.failures.next_pending()
        if error is not None:
            raise error

    def manual_seed(self, seed: int) -> None:
        """Seed this session's random numbers, as ``torch.manual_seed`` does locally."""
        self._connection.issue(m.Seed(seed).wire())

    def seed(self) -> None:
        """Seed this session's random numbers from the worker's entropy, so that nobody can foresee
        them: as ``torch.seed`` does, but that the seed is not told.
        """
        self._connection.issue(m.Seed(None).wire())

    def search(self, *tags: str) -> Any:
        """Pointers to everything of this session and of the owner's that has all tags."""
        return self._connection.run(
            self._search(self._ask(lambda n: m.Search(n, list(tags)).wire()))
        )

    async def _search(self, asked: asyncio.Future[Any]) -> list[Pointer]:
        answer = await asked
        found = [self._found(described) for described in answer["objects"]]
        for name in answer["datasets"]:
            dataset = await self._open(
                self._ask(lambda n, name=name: m.OpenDataset(n, name).wire())
            )
            found += dataset.batch(max(dataset.rows, 1), 0) if dataset.rows else ()
        return found

    def _found(self, described: Mapping[str, Any]) -> Pointer:
        """A pointer of its own to an object that may have other pointers already."""
        id = self._connection.new_id()
        alias = [m.Execute.code, "torch.Tensor.detach", [id], [[0, described["id"]]], {}, 0]
        self._connection.issue(alias)
        return make_pointer(
            self._connection, id, tuple(described["shape"]), DTYPES[described["dtype"]]
        )

    def dataset(self, name: str) -> Any:
        """A data set of the owner's.

        Raises:
            NotFound: the worker has none of that name.
        """
        return self._connection.run(self._open(self._ask(lambda n: m.OpenDataset(n, name).wire())))

    def _ask_dataset(self, name: str) -> asyncio.Future[Any]:
        return self._ask(lambda n: m.OpenDataset(n, name).wire())

    async def _open(self, asked: asyncio.Future[Any]) -> RemoteDataset:
        return RemoteDataset(self._connection, await asked)

    def cancel(self) -> None:
        """Give up every command that was sent and has not started; their results are lost."""
        self._connection.cancel()

    def _ask(self, make: Any) -> asyncio.Future[Any]:
        return self._connection.ask(make)

    # --- its end ---

    def close(self) -> Any:
        """End the session; the worker forgets its objects."""
        return self._connection.run(self._end())

    async def _end(self) -> None:
        if self._installed:
            self._installed = False
            optimizers.uninstall()
        await self._connection.close()

    async def __aenter__(self) -> Worker:
        await self._connection.opened
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()


class Connecting:
    """What ``connect`` returns: await it, or use it with ``async with``."""

    def __init__(self, worker: Worker, connection: Connection) -> None:
        self._worker, self._connection = worker, connection

    def __await__(self) -> Generator[Any, None, Worker]:
        return self._open().__await__()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this is no worker yet, so it has no {name!r}: write worker = await wsfed.connect(url)"
        )

    async def _open(self) -> Worker:
        try:
            await asyncio.shield(self._connection.opened)
        except BaseException:
            await self._worker._end()
            raise
        return self._worker

    async def __aenter__(self) -> Worker:
        return await self._open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._worker._end()


def connect(
    url: str,
    *,
    id: str | None = None,
    token: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10.0,
    reconnect: float = 5.0,
) -> Connecting:
    """Connect to a worker: ``await connect(url)`` or ``async with connect(url) as bob``.

    Args:
        url: ``ws://host:port``, or ``wss://`` with TLS.
        id: what this program calls the worker; by default what it calls itself.
        token: shown to a worker that asks for one.
        ssl: certificates to trust, for ``wss://`` (``ssl.create_default_context(cafile=…)``).
        timeout: seconds for a connection to be made.
        reconnect: seconds to go on trying when the connection breaks; the session is resumed.

    Raises:
        ConnectionLost: nothing answers there.
        AuthenticationFailed: the worker refuses the token.
        ValueError: not the URL of a worker, or ``ssl`` without ``wss://``.
    """
    check_url(url, ssl)
    connection = Connection(
        url,
        lambda: dial(url, ssl=ssl, timeout=timeout),
        asyncio.get_running_loop(),
        token=token,
        reconnect=reconnect,
    )
    worker = Worker(id or "", connection)
    connection.start()
    return Connecting(worker, connection)
