"""The sites of a training: opened, compared, and opened again when they are lost."""

from __future__ import annotations

import asyncio
import fnmatch
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from torch import nn

from wsfed.errors import ConnectionLost, FederatedError, SessionLost
from wsfed.federated.broadcast import Broadcast
from wsfed.federated.compression import Compression, negotiate
from wsfed.federated.recipe import Recipe
from wsfed.federated.replica import Replica
from wsfed.federated.sampling import Candidate
from wsfed.federated.site import Site
from wsfed.federated.state import buffers_of, state_of

__all__ = ["LOST", "Network", "Opener", "Setup"]

#: What tells that a worker is gone, and not that training is wrong.
LOST = (ConnectionLost, SessionLost)

#: Seconds between looks at connections that come back.
_PAUSE: Final = 0.05

#: Opens a connection to a worker: ``partial(wsfed.connect, url)``.
Opener: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What every site is set up with.

    Attributes:
        dataset: its name, or a pattern (``"shard-*"``); each that fits is a site of its own.
        validation: name of the data set to evaluate on, or a pattern; ``None`` for none.
        recipe: how to train.
        mu: of a proximal term.
        corrects: whether gradients are corrected.
        compression: of what travels each round.
    """

    dataset: str
    validation: str | None
    recipe: Recipe
    mu: float = 0.0
    corrects: bool = False
    compression: Compression | None = None


@dataclass(slots=True)
class _Place:
    """One worker: as it was given, and what is there now."""

    given: Any
    worker: Any = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    sites: list[Site] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lost: str = ""


class Network:
    """Sites on workers; an async context manager.

    Args:
        workers: connected ones, which stay the caller's; or what opens a connection, which is
            closed in the end, and opened again when it is lost.
        model: of which each worker gets a copy.
        setup: the same for all.

    Attributes:
        broadcast: the model as it goes to all of them.
    """

    def __init__(self, workers: Sequence[Any | Opener], model: nn.Module, setup: Setup) -> None:
        if not isinstance(workers, Sequence) or isinstance(workers, str):
            raise TypeError(f"workers is a list, not {workers!r}")
        if not workers:
            raise FederatedError("there are no workers")
        for each in workers:
            if not hasattr(each, "link") and not callable(each):
                raise TypeError(
                    f"{each!r} is no worker: give connected ones, or what opens a connection, such "
                    "as functools.partial(wsfed.connect, url)"
                )
            if getattr(getattr(each, "link", None), "blocking", False):
                raise TypeError(f"{each!r} is of the blocking world: write wsfed.sync.fit(...)")
        self._places = [_Place(each) for each in workers]
        self._model, self._setup = model, setup
        cast = None if setup.compression is None else setup.compression.broadcast
        self.broadcast = Broadcast(cast, buffers_of(model))

    # --- opening ---

    async def __aenter__(self) -> Network:
        try:
            # torch's optimizers load its compiler when the first one is made: seconds.
            loading = asyncio.to_thread(importlib.import_module, "torch._dynamo")
            async with asyncio.TaskGroup() as group:
                group.create_task(loading)
                for place in self._places:
                    group.create_task(self._connect(place))
            digests = await self._digests()
            async with asyncio.TaskGroup() as group:
                for place in self._places:
                    group.create_task(self._set_up(place, digests))
            self._compare()
        except BaseException as error:
            await self._close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        return self

    async def _connect(self, place: _Place) -> None:
        place.stack = AsyncExitStack()
        if hasattr(place.given, "link"):
            place.worker = place.given
            await place.worker.link.opened
        else:
            place.worker = await place.stack.enter_async_context(place.given())

    async def _digests(self) -> dict[str, bytes]:
        return await asyncio.to_thread(self.broadcast.digests, state_of(self._model))

    async def _set_up(self, place: _Place, digests: Mapping[str, bytes]) -> None:
        worker, setup, compression = place.worker, self._setup, self._setup.compression
        names = _fitting(worker, setup.dataset)
        if compression is not None:
            await negotiate(worker, compression)
        replica = Replica(
            *(worker, self._model, setup.recipe),
            mu=setup.mu,
            corrects=setup.corrects,
            broadcast=self.broadcast,
            digests=digests,
            scheme=None if compression is None else compression.scheme,
        )
        turns = asyncio.Lock()
        place.sites = []
        for name in names:
            site = worker.id if len(names) == 1 else f"{worker.id}/{name}"
            validation = await self._validation(worker, name)
            dataset = await worker.dataset(name)
            place.sites.append(Site(site, dataset, validation, replica, turns, setup.recipe))
        place.names, place.lost = [site.name for site in place.sites], ""

    async def _validation(self, worker: Any, dataset: str) -> Any:
        wanted = self._setup.validation
        if wanted is None:
            return None
        if wanted == dataset:
            raise FederatedError(
                f"validation={wanted!r} is what is trained on: split it on the worker "
                "(wsfed worker --split), or name another"
            )
        names = [name for name in _fitting(worker, wanted) if name != dataset]
        if len(names) != 1:
            raise FederatedError(
                f"worker {worker.id!r} has {len(names)} data sets {wanted!r} to evaluate on; it "
                "takes one"
            )
        return await worker.dataset(names[0])

    def _compare(self) -> None:
        sites = self.sites
        names = [site.name for site in sites]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise FederatedError(
                f"several workers are called {', '.join(sorted(twice))}: start them with other "
                "ids, or connect with connect(url, id=…)"
            )
        for site in sites:
            site.check_fields()
            if site.kinds != sites[0].kinds:
                raise FederatedError(
                    f"the rows of {site.name!r} ({site.told}) are not of the kind of those of "
                    f"{sites[0].name!r} ({sites[0].told})"
                )

    @property
    def compresses(self) -> bool:
        """Whether what travels is compressed."""
        return self._setup.compression is not None

    # --- while training goes on ---

    @property
    def sites(self) -> list[Site]:
        """Those that are there, in the order of the workers."""
        return [site for place in self._places for site in place.sites]

    @property
    def lost(self) -> dict[str, str]:
        """Why the others are not, by site."""
        return {name: p.lost for p in self._places if p.lost for name in p.names}

    async def settle(self, needed: int) -> None:
        """Wait until so many sites have a connection, or nobody tries to get one any more."""
        # There is no event for it: any of several connections may come back, or none.
        while len(self.candidates) < needed and self._trying():  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE)

    def _trying(self) -> bool:
        trying = False
        for place in self._places:
            if place.sites and place.worker.closed:
                self.lose(place.worker, "its connection is lost")
            elif place.sites and not place.worker.connected:
                trying = True
        return trying

    @property
    def candidates(self) -> list[Candidate]:
        """The sites that are there and have a connection, for a sampler."""
        return [
            Candidate(
                site.name,
                site.rows,
                frozenset(map(str, site.worker.info.get("tags", ()))),
                site.worker.id,
            )
            for site in self.sites
            if site.worker.connected
        ]

    def lose(self, worker: Any, reason: str) -> None:
        """A worker is gone, with all of its sites."""
        for place in self._places:
            if place.worker is worker and not place.lost:
                place.lost, place.sites = reason, []

    async def reopen(self) -> None:
        """Try once to open again what was lost, where it is known how."""
        async with asyncio.TaskGroup() as group:
            for place in self._places:
                if place.lost and not hasattr(place.given, "link"):
                    group.create_task(self._reopen(place))

    async def _reopen(self, place: _Place) -> None:
        try:
            await place.stack.aclose()
            await self._connect(place)
            await self._set_up(place, await self._digests())
        except LOST as error:
            place.lost, place.sites = str(error), []

    # --- the end ---

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(
            *(place.stack.aclose() for place in self._places), return_exceptions=True
        )


def _fitting(worker: Any, pattern: str) -> list[str]:
    """The worker's data sets of that name, or that fit the pattern."""
    known = list(worker.info["datasets"])
    names = [name for name in known if name == pattern or fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise FederatedError(
            f"worker {worker.id!r} has no data set {pattern!r}; it has "
            + (", ".join(map(repr, known)) or "none")
        )
    return names
