"""Workers of a simulation on a Ray cluster: Ray brings processes and rows to machines.

Training itself goes over wsfed's own sockets, as with any other worker.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from wsfed.errors import FederatedError
from wsfed.worker.datasets import Dataset

if TYPE_CHECKING:
    import torch

__all__ = ["LOCAL", "Host", "hosted"]

_T = TypeVar("_T")

#: In place of an address: a Ray of one's own on this machine.
LOCAL: Final = "local"
_LOOPBACK: Final = "127.0.0.1"
#: Seconds for the cluster's head to accept a connection. Ray itself goes on trying for minutes.
_REACH_SECONDS: Final = 5.0
#: Seconds for all actors to be there: a busy machine takes a while to load torch in each.
_START_SECONDS: Final = 120.0
#: Seconds for an actor to end its sessions, before its process is ended.
_STOP_SECONDS: Final = 10.0
#: Nothing is reported to Ray's makers; the other one is what Ray announces as its next default, and
#: warns of where it is not set.
_QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Host:
    """A worker in a process of Ray's; made an actor by :func:`hosted`.

    Args:
        id: the worker's name.
        token: what a client has to show.
        threads: torch's threads.
        here: the machine of the client, as Ray calls it.
    """

    def __init__(self, id: str, token: str, threads: int, here: str) -> None:
        self._id, self._token, self._threads, self._here = id, token, threads, here
        self._stop = asyncio.Event()
        self._url: asyncio.Future[str] | None = None

    async def serve(self, parts: Sequence[tuple[str, Mapping[str, torch.Tensor]]]) -> None:
        """Offer data sets, by name and fields, until :meth:`stop` is called.

        Raises:
            OSError: the machine's address cannot be bound.
            DatasetError: rows that make no data set.
        """
        import ray
        import torch

        from wsfed.node import Node

        torch.set_num_threads(self._threads)
        near = ray.get_runtime_context().get_node_id() == self._here
        address = _LOOPBACK if near else ray.util.get_node_ip_address()
        try:
            sets = [Dataset(name, fields) for name, fields in parts]
            async with (
                Node(self._id, datasets=sets, token=self._token) as node,
                node.listen(address) as url,
            ):
                self._told().set_result(url)
                await self._stop.wait()
        except Exception as error:  # whatever it is, who waits for the URL is told
            if not self._told().done():
                self._told().set_exception(error)
            raise

    async def url(self) -> str:
        """Where it listens, once it does."""
        return await self._told()

    async def stop(self) -> None:
        """Tell clients goodbye, and end :meth:`serve`."""
        self._stop.set()

    def _told(self) -> asyncio.Future[str]:
        if self._url is None:
            self._url = asyncio.get_running_loop().create_future()
        return self._url


@asynccontextmanager
async def hosted(
    parts: Sequence[Dataset], address: str, workers: int | None
) -> AsyncIterator[list[Callable[[], Any]]]:
    """Workers on a Ray cluster, each with a run of the data sets, as what opens connections.

    Sites are called, and come in the order, as on one worker ``simulation`` that has all of them;
    so the same seed gives the same training.

    Args:
        parts: the clients' data sets, in order.
        address: ``"local"``, or ``HOST:PORT`` of a cluster that this machine is part of. A program
            that is connected to Ray already stays so, and its cluster is used.
        workers: how many, each with a CPU; by default as many as there are.

    Raises:
        FederatedError: Ray is not installed, the cluster is out of reach or has no room, or a
            process of it ended.
    """
    ray = _ray()
    await _reach(address)
    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            # The thread that starts Ray's processes has to live as long as they: the system ends
            # them with it. Those of the loop do.
            await _to_the_end(partial(_join, ray, address, workers))
        count = min(_room(ray, workers), len(parts))
        async with _actors(ray, parts, count) as openers:
            yield openers
    finally:
        if is_ours and ray.is_initialized():
            await _to_the_end(ray.shutdown)


def _ray() -> Any:
    with _environment(_QUIET):
        try:
            import ray
        except ImportError:
            raise FederatedError("Ray is not installed: pip install 'wsfed[ray]'") from None
    return ray


# --- the cluster ----------------------------------------------------------------------------------


async def _reach(address: str) -> None:
    """Whether somebody is there."""
    if address == LOCAL:
        return
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        raise FederatedError(
            f"--ray takes {LOCAL!r}, or HOST:PORT of a cluster that this machine is part of "
            f"(ray start), not {address!r}"
        )
    try:
        async with asyncio.timeout(_REACH_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, OverflowError, TimeoutError) as error:
        said = str(error) or f"no answer within {_REACH_SECONDS:g} s"
        raise FederatedError(f"no Ray cluster at {address}: {said}") from None
    writer.close()


def _join(ray: Any, address: str, workers: int | None) -> None:
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        # Ray's own ports are for this machine alone then.
        options |= {"include_dashboard": False, "num_cpus": workers, "_node_ip_address": _LOOPBACK}
    try:
        with _environment(_QUIET):
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises whatever its parts raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise FederatedError(f"no Ray cluster at {address}: {said[0]}") from error


def _room(ray: Any, workers: int | None) -> int:
    """How many workers there are to be."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    wanted = workers or cpus
    if not 0 < wanted <= cpus:
        raise FederatedError(f"the Ray cluster has {cpus} CPUs, and each worker needs one")
    return wanted


# --- actors ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _actors(
    ray: Any, parts: Sequence[Dataset], count: int
) -> AsyncIterator[list[Callable[[], Any]]]:
    import torch

    import wsfed

    here = ray.get_runtime_context().get_node_id()
    kind = ray.remote(Host).options(num_cpus=1, max_restarts=0)
    actors, serving, names, tokens = [], [], [], []
    try:
        for index in np.array_split(np.arange(len(parts)), count):
            own = [parts[place] for place in index]
            token = secrets.token_urlsafe(32)
            actor = kind.remote("simulation", token, torch.get_num_threads(), here)
            rows = ray.put([(each.name, dict(each.fields)) for each in own])
            actors.append(actor)
            serving.append(actor.serve.remote(rows))
            tokens.append(token)
            names.append(_name(own, len(parts)))
        try:
            async with asyncio.timeout(_START_SECONDS):
                urls = [await actor.url.remote() for actor in actors]
        except TimeoutError:
            raise FederatedError(
                f"the Ray cluster has not started {count} workers within {_START_SECONDS:g} s: "
                "other work may hold its CPUs"
            ) from None
        except ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[-1]
            raise FederatedError(f"a worker of the Ray cluster did not start: {said}") from error
        yield [
            partial(wsfed.connect, url, id=name, token=token)
            for url, name, token in zip(urls, names, tokens, strict=True)
        ]
    finally:
        await asyncio.gather(
            *(_stopped(ray, *each) for each in zip(actors, serving, strict=False)),
        )


def _name(own: Sequence[Dataset], all_parts: int) -> str:
    """Of a worker, so that its sites are called as if all data sets were on one.

    The only site of a worker has the worker's name, others that of their data set behind it.
    """
    return f"simulation/{own[0].name}" if len(own) == 1 < all_parts else "simulation"


async def _stopped(ray: Any, actor: Any, serving: Any) -> None:
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await actor.stop.remote()
            await serving
    except (TimeoutError, ray.exceptions.RayError):
        pass  # it is ended all the same
    ray.kill(actor)


# --- what Ray does in this process ----------------------------------------------------------------


async def _to_the_end(work: Callable[[], _T]) -> _T:
    """Run ``work`` in a thread, to its end also where the caller is cancelled meanwhile."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables, where the user has not, while the context lasts."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
