"""The blocking twin: the same workers and pointers, without ``await``.

::

    from wsfed import sync

    with sync.connect("ws://127.0.0.1:8777") as bob:
        x = bob.send(torch.ones(3))
        print((x + 1).get())

The event loop runs in a background thread, so this works in a notebook, whose own loop is busy.
Operations are still pipelined: only what brings a value back waits.
"""

from __future__ import annotations

import asyncio
import inspect
import ssl as ssl_module
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from wsfed.client.background import background
from wsfed.client.connection import Connection, awaited
from wsfed.client.hub import HubClient as _HubClient
from wsfed.client.hub import HubEvent, HubEvents, HubNode
from wsfed.client.virtual import VirtualWorker as _VirtualWorker
from wsfed.client.worker import Worker as _Worker
from wsfed.errors import ConnectionLost, PointerError
from wsfed.federated.fit import fit as _fit
from wsfed.pointers import modules
from wsfed.pointers.modules import copy, move, send
from wsfed.transport.websocket import check_url, dial
from wsfed.worker.datasets import Dataset

__all__ = [
    "HubClient",
    "VirtualWorker",
    "Worker",
    "connect",
    "copy",
    "fit",
    "get",
    "hub",
    "move",
    "send",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def get(value: Any, *, grads: bool = True) -> Any:
    """Bring home a pointer, a module, an optimizer's state, or a collection of pointers.

    Arguments and errors are those of :func:`wsfed.get`.

    Raises:
        PointerError: it is of the async world, where :func:`wsfed.get` is awaited.
    """
    result = modules.get(value, grads=grads)
    if isinstance(result, asyncio.Future):
        result.cancel()
        raise PointerError("this is of the async world: write await wsfed.get(...)")
    return result


class Worker(_Worker):
    """A session on a worker; a context manager. Made by :func:`connect`."""

    _counted = True

    def close(self) -> None:
        """End the session; the worker forgets its objects. May be called twice."""
        if not self._counted:
            return
        self._counted = False
        try:
            super().close()
        finally:
            background.release()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect(
    url: str,
    *,
    id: str | None = None,
    token: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10.0,
    reconnect: float = 5.0,
) -> Worker:
    """Connect to a worker, and wait until it has answered.

    Arguments and errors are those of :func:`wsfed.connect`.
    """
    check_url(url, ssl)
    loop = background.acquire()

    async def open_worker() -> Worker:
        connection = Connection(
            url,
            lambda: dial(url, ssl=ssl, timeout=timeout),
            loop,
            token=token,
            blocking=True,
            reconnect=reconnect,
        )
        worker = Worker(id or "", connection)
        connection.start()
        try:
            await connection.opened
        except BaseException:
            await worker._end()
            raise
        return worker

    try:
        return background.run(loop, open_worker())
    except BaseException:
        background.release()
        raise


# --- behind a hub ---------------------------------------------------------------------------------


class _HubWorker(Worker):
    """A session of a hub's, whose loop is the hub's as well."""

    def close(self) -> None:
        """End the session; the worker forgets its objects. May be called twice."""
        if self._installed:  # else the hub has ended it, and perhaps the loop
            _Worker.close(self)


class HubClient:
    """A hub and the nodes behind it; a context manager. Made by :func:`hub`.

    Sessions that it has opened end with it.
    """

    def __init__(self, client: _HubClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop
        self._counted = True

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        if not self._counted:
            work.close()
            raise ConnectionLost(self.url, "it was closed by this program")
        return background.run(self._loop, work)

    @property
    def url(self) -> str:
        """Where the hub is."""
        return self._client.url

    @property
    def connected(self) -> bool:
        """Whether the hub is there; while it is not, it is looked for."""
        return self._client.connected

    def nodes(self, tags: Collection[str] = ()) -> list[HubNode]:
        """Those that are there and have all tags, in the order in which they came."""

        async def nodes() -> list[HubNode]:
            return self._client.nodes(tags)

        return self._run(nodes())

    def events(self) -> Iterator[HubEvent]:
        """Comings and goings: ``for event in hub.events()``; begins with who is there."""

        async def begin() -> HubEvents:
            return self._client.events()

        async def following(events: HubEvents) -> HubEvent | None:
            return await anext(events, None)

        events = self._run(begin())
        while (event := self._run(following(events))) is not None:
            yield event

    def worker(
        self, id: str, *, token: str | None = None, reconnect: float | None = None
    ) -> Worker:
        """Open a session with a node, and wait until it has answered.

        Arguments and errors are those of :meth:`wsfed.HubClient.worker`.
        """

        async def open_worker() -> Any:
            return await self._client.worker(id, token=token, reconnect=reconnect)

        worker: Worker = self._run(open_worker())
        return worker

    def workers(self, tags: Collection[str] = (), *, token: str | None = None) -> list[Worker]:
        """Sessions with all nodes that are there and have all tags.

        Called again, it gives the same sessions, and new ones for new nodes.
        """
        workers: list[Any] = self._run(self._client.workers(tags, token=token))
        return workers

    def wait_for(
        self,
        count: int,
        tags: Collection[str] = (),
        *,
        timeout: float | None = 60.0,
        token: str | None = None,
    ) -> list[Worker]:
        """Wait until so many nodes with all tags are there; gives sessions with the first ones.

        Arguments and errors are those of :meth:`wsfed.HubClient.wait_for`.
        """
        waiting = self._client.wait_for(count, tags, timeout=timeout, token=token)
        workers: list[Any] = self._run(waiting)
        return workers

    def close(self) -> None:
        """End every session that was opened here. May be called twice."""
        if not self._counted:
            return
        self._counted = False
        try:
            background.run(self._loop, self._client.close())
        finally:
            background.release()

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def hub(
    url: str,
    *,
    token: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10.0,
    reconnect: float = 10.0,
) -> HubClient:
    """Reach the nodes behind a hub, and wait until it has answered.

    Arguments and errors are those of :func:`wsfed.hub`.
    """
    check_url(url, ssl)
    loop = background.acquire()

    async def open_hub() -> _HubClient:
        client = _HubClient(
            url,
            token=token,
            ssl=ssl,
            timeout=timeout,
            reconnect=reconnect,
            kind=_HubWorker,
            blocking=True,
        )
        return await client.__aenter__()

    try:
        return HubClient(background.run(loop, open_hub()), loop)
    except BaseException:
        background.release()
        raise


# --- in this process ------------------------------------------------------------------------------


class VirtualWorker(_VirtualWorker):
    """A blocking worker within this process, whether or not an event loop runs here."""

    def __init__(
        self,
        id: str,
        *,
        datasets: Iterable[Dataset] = (),
        device: str | torch.device = "cpu",
        max_memory: int | None = None,
    ) -> None:
        super().__init__(id, datasets=datasets, device=device, max_memory=max_memory, blocking=True)


# --- training -------------------------------------------------------------------------------------


def _blocking(train: Callable[_P, Coroutine[Any, Any, _T]], doc: str) -> Callable[_P, _T]:
    """The same function with these workers, which waits for its result."""
    signature = inspect.signature(train)

    @wraps(train, assigned=("__name__", "__qualname__"))
    def blocking(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = background.acquire()
        try:
            for each in signature.bind(*args, **kwargs).arguments["workers"]:
                if getattr(getattr(each, "link", None), "loop", loop) is not loop:
                    raise TypeError(
                        f"{each!r} is of the async world: write await wsfed.federated.fit(...)"
                    )

            async def run() -> _T:
                awaited.set(True)
                # Asking for their number is what makes a new thread use torch's number of threads.
                torch.get_num_threads()
                return await train(*args, **kwargs)

            return background.run(loop, run())
        finally:
            background.release()

    blocking.__doc__ = doc
    return blocking


fit = _blocking(
    _fit,
    """Train a model over the rows of many workers, and wait for the end.

    Arguments and errors are those of :func:`wsfed.federated.fit`, and so is what comes of it, bit
    for bit. Workers are those of this module; what opens connections, again when they are lost, is
    here, too, ``partial(wsfed.connect, url)``. Callbacks are called in the event loop's thread and
    may be coroutines; what they ask of a worker has to be awaited. Ctrl-C ends training, and leaves
    nothing of it running; the model is what the last finished round made of it.

    Raises:
        TypeError: a worker is of the async world.
    """,
)
