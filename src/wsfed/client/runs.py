"""A plan that runs over a data set on its worker: one message, and numbers that stream back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from wsfed.errors import LocalProtocolError, PlanError, RemoteProtocolError
from wsfed.pointers.ahead import Ahead
from wsfed.pointers.plan import Plan
from wsfed.pointers.pointer import Pointer
from wsfed.pointers.recording import recording_now
from wsfed.pointers.site import capture_site, describe_site
from wsfed.pointers.stepping import hold, let_go
from wsfed.protocol import messages as m

__all__ = ["Batches", "DatasetRun", "Progress", "begin"]


@dataclass(frozen=True, slots=True)
class Batches:
    """Which batches, in which order.

    Attributes:
        epochs: how often all rows are gone through.
        batch_size: rows of a full batch.
        seed: ``None`` for the rows' own order; the order of epoch ``n`` is that of ``seed + n``.
        sizes: rows of each batch of an epoch.
        rate: probability with which each row is taken; ``None`` for batches in order.
    """

    epochs: int
    batch_size: int
    seed: int | None
    sizes: Sequence[int]
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A batch is done.

    Attributes:
        done: batches that are done by now, from 1.
        total: batches that there are.
        epoch: of this batch, from 0.
        value: what the function gave for it: numbers where it gives pointers.
    """

    done: int
    total: int
    epoch: int
    value: Any


class DatasetRun:
    """A run that is under way; made by ``RemoteDataset.run``.

    Await it for the numbers of all batches, a tensor (float64, one element a batch) for each one
    that the function gives, in the structure in which it gives them; iterate it (``async for``) for
    each batch's as they come. In the blocking world: ``result()`` and ``for``. Cancelling
    who awaits it stops it.

    Attributes:
        total: batches that there are.
        stopped: once it is over: ``""`` if it came to its end, else ``"until"``, ``"stop"`` or
            ``"error"``.
    """

    def __init__(self, link: Any, ahead: Ahead, batches: Batches, shape: pytree.TreeSpec) -> None:
        self._link, self._ahead, self._batches, self._shape = link, ahead, batches, shape
        self.total = ahead.total
        self.stopped = ""
        self._values: list[list[float]] = []
        self._news: asyncio.Event = asyncio.Event()
        self._over = asyncio.Event()
        self._request = 0
        self._asked: asyncio.Future[Any] = asyncio.Future(loop=link.loop)

    @property
    def done(self) -> int:
        """Batches that are known to be done."""
        return len(self._values)

    def __repr__(self) -> str:
        return f"<DatasetRun: {self.done} of {self.total} batches>"

    def stop(self) -> None:
        """End it with the batch that it is at; what is done stays done."""
        if not self._over.is_set() and not self._ahead.is_steady:
            for optimizer in self._ahead.optimizers:
                hold(optimizer, self)
        self._link.stop(self._request)

    # --- waiting for it ---

    def __await__(self) -> Generator[Any, None, Any]:
        waiting: Generator[Any, None, Any] = self._whole().__await__()
        return waiting

    def result(self) -> Any:
        """The numbers of all batches; waits for the end. For the blocking world."""
        return self._link.run(self._whole())

    async def _whole(self) -> Any:
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            self.stop()
            raise
        await self._asked  # raises what it failed with
        columns = list(zip(*self._values, strict=True)) or [()] * self._shape.num_leaves
        tensors = [torch.tensor(column, dtype=torch.float64) for column in columns]
        return pytree.tree_unflatten(tensors, self._shape)

    async def __aiter__(self) -> AsyncIterator[Progress]:
        place = 0
        while (found := await self._next(place)) is not None:
            yield found
            place += 1

    def __iter__(self) -> Iterator[Progress]:
        place = 0
        while (found := self._link.run(self._next(place))) is not None:
            yield found
            place += 1

    async def _next(self, place: int) -> Progress | None:
        while place >= len(self._values):
            if self._over.is_set():
                await self._asked
                return None
            self._news.clear()
            await self._news.wait()
        value = pytree.tree_unflatten(self._values[place], self._shape)
        return Progress(place + 1, self.total, place // len(self._batches.sizes), value)

    # --- what the worker tells ---

    def _begun(self, request: int, asked: asyncio.Future[Any]) -> None:
        self._request, self._asked = request, asked
        self._link.loop.call_soon_threadsafe(asked.add_done_callback, self._ended)

    def _ended(self, asked: asyncio.Future[Any]) -> None:
        failed = asked.cancelled() or asked.exception() is not None
        self.stopped = "error" if failed else asked.result()["stopped"]
        self._ahead.ended_after(self.done)
        for optimizer in self._ahead.optimizers:
            let_go(optimizer, self)
        self._over.set()
        self._news.set()

    def _progress(self, told: m.Progress) -> None:
        width = self._shape.num_leaves
        count = len(self._values) + len(told.values)
        if told.done != count or count > self.total or any(len(v) != width for v in told.values):
            raise RemoteProtocolError("unfit-answer", "a run over a data set reports otherwise")
        self._values += told.values
        self._news.set()


def begin(
    link: Any,
    name: str,
    fields: Sequence[str],
    plan: Plan[..., Any],
    make: Callable[[int], list[Pointer]],
    bring: Callable[[list[Pointer]], None],
    batches: Batches,
    until: Callable[[Any], Any] | None,
) -> DatasetRun:
    """Have a plan run over a data set. Does not wait."""
    site = capture_site()
    if (recording := recording_now()) is not None:
        recording.refuse("a run over a data set has no place in it")
    ahead = Ahead(plan if until is None else plan.judged(until), make, bring)
    first = batches.sizes[0]
    step, failed = ahead.batch(first, site), None
    try:
        shape, shown, judged = _places(plan, step, site, has_end=until is not None)
    except PlanError:
        ahead.run_first(first, site)  # as in a loop, where the value is looked at behind it
        raise
    try:
        for rows in ([*batches.sizes] * batches.epochs)[1:]:
            ahead.batch(rows, site)
    except Exception as error:
        failed = error  # as in a loop, the batches before this one are run
    run = DatasetRun(link, ahead, batches, shape)
    rows_of = [row for segment in ahead.segments for row in segment.rows]
    numbers = torch.tensor([number for row in rows_of for number in row], dtype=torch.float64)
    known = {size: ahead.fields(size) for size in set(batches.sizes)}
    places = {id: place for ids in known.values() for place, id in enumerate(ids)}
    segments = [segment.wire(link, places, site) for segment in ahead.segments]
    requests: list[int] = []

    def command(request: int) -> list[Any]:
        requests.append(request)
        return m.RunOver(
            request,
            name,
            list(fields),
            batches.seed,
            batches.batch_size,
            len(batches.sizes),
            segments,
            0,
            shown,
            judged,
            batches.rate,
        ).wire()

    note = ahead.segments[-1].step.assembled.sites.called_at(site)
    try:
        asked = link.ask(command, note, progress=run._progress, tensor=numbers)
    except LocalProtocolError as error:
        raise PlanError(
            plan.name, f"{error.reason}: run it over fewer epochs", describe_site(site)
        ) from None
    ahead.end()
    if until is not None and not ahead.is_steady:
        for optimizer in ahead.optimizers:
            hold(optimizer, run)
    run._begun(requests[0], asked)
    if failed is not None:
        raise failed
    return run


def _places(
    plan: Plan[..., Any], step: Any, site: Any, *, has_end: bool
) -> tuple[pytree.TreeSpec, list[int], int | None]:
    """The structure of the result, and where a program gives its parts and what it ends on."""
    result, judged = step.result, None
    if has_end:
        result, verdict = result
        judged = _place(plan, verdict, step, "what it ends on", site)
    leaves, shape = pytree.tree_flatten(result)
    return shape, [_place(plan, leaf, step, "its result", site) for leaf in leaves], judged


def _place(plan: Plan[..., Any], leaf: Any, step: Any, what: str, site: Any) -> int:
    """Where a program gives this result."""
    given = step.outs[: len(step.kept.wanted)]
    if not isinstance(leaf, Pointer) or leaf._handle.id not in given:
        reason = f"run over a data set, {what} is made in it"
        raise PlanError(plan.name, reason, describe_site(site))
    meta = leaf._known()
    if meta.shape not in ((), (1,)) or meta.dtype.is_complex:
        reason = f"run over a data set, {what} is a number for each batch, not {list(meta.shape)}"
        raise PlanError(plan.name, reason, describe_site(site))
    return int(given.index(leaf._handle.id))
