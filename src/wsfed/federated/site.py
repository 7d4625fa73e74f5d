"""One data set on one worker, as training sees it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wsfed.errors import FederatedError, UpdateRejected
from wsfed.federated.broadcast import digests_of
from wsfed.federated.contribution import Contributor
from wsfed.federated.recipe import Recipe
from wsfed.federated.replica import Asked, Replica
from wsfed.federated.strategies.strategy import LocalTerms, Reply, State, Strategy
from wsfed.pointers.link import link_of
from wsfed.protocol import messages as m

__all__ = ["Report", "Site"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a site did in a round.

    Attributes:
        reply: for the strategy.
        loss: mean over the batches that it trained on, weighted by rows.
        seconds: from the first command to the last byte of the answer.
        bytes_up: to the worker, of its sites together since another one has reported.
        bytes_down: from it, likewise.
        residual: what was not sent of the changes: a pointer; see :meth:`Site.keep`.
    """

    reply: Reply
    loss: float
    seconds: float
    bytes_up: int
    bytes_down: int
    residual: Any = None


@dataclass(slots=True)
class _Issued:
    """What a site was told to do, and what has come of it so far.

    Attributes:
        run: over its rows.
        turn: of the replica.
        asked: for the values that the run leaves.
        within: whether the change was within its bound.
        loss_before: of the model that was given.
        losses: of the run's batches, once it is over.
        told: what has come of what was asked for.
        values: that it has left, by name.
    """

    run: Any
    turn: int
    asked: Asked | None = None
    within: Awaitable[torch.Tensor] | None = None
    loss_before: float | None = None
    losses: torch.Tensor | None = None
    told: Sequence[torch.Tensor] = ()
    values: State | None = None


class Site:
    """A data set, and the replica of the model that is trained on it.

    Sites of one worker share its replica, so they take turns in telling it what to do. What is kept
    of a site's changes until its next round is its own.

    Args:
        name: who this is.
        dataset: rows to train on.
        validation: rows to evaluate on.
        replica: on the worker of both.
        turns: held while the replica is in use.
        recipe: how to train.

    Attributes:
        rows: to train on.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        validation: Any,
        replica: Replica,
        turns: asyncio.Lock,
        recipe: Recipe,
    ) -> None:
        self.name, self.rows = name, len(dataset)
        self.validation_rows = 0 if validation is None else len(validation)
        self._dataset, self._validation = dataset, validation
        self._replica, self._turns, self._recipe = replica, turns, recipe
        #: What was not sent of its changes: a pointer.
        self._residual: Any = None

    @property
    def kinds(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of a row, of each field that is used."""
        fields = self._dataset.fields
        wanted = fields if self._recipe.fields is None else self._recipe.fields
        return [(name, fields[name].dtype, fields[name].shape[1:]) for name in wanted]

    def check_fields(self) -> None:
        """Whether the fields that are wanted are there.

        Raises:
            FederatedError: one is not.
        """
        fields = self._dataset.fields
        for name in self._recipe.fields or ():
            if name not in fields:
                known = ", ".join(map(repr, fields))
                raise FederatedError(
                    f"the rows of {self.name!r} have no field {name!r}; they have {known}"
                )

    def check_rules(self, needs: str) -> None:
        """Whether the worker's owner lets leave what training needs.

        Args:
            needs: what needs more than changes of the model; nothing where none does.

        Raises:
            FederatedError: a strict worker releases such changes, and nothing else.
        """
        if needs and self._replica.rules is not None:
            raise FederatedError(
                f"worker {self.worker.id!r} releases nothing but changes of a model with noise, "
                f"and {needs} needs more"
            )

    @property
    def told(self) -> str:
        """The kinds for people."""
        return ", ".join(
            f"{name}: {str(dtype).removeprefix('torch.')}{list(shape)}"
            for name, dtype, shape in self.kinds
        )

    @property
    def worker(self) -> Any:
        """The worker that has the rows."""
        return self._replica.worker

    async def train(
        self,
        state: State,
        terms: LocalTerms,
        round: int,
        strategy: Strategy,
        progress: Callable[[str, Any], None] | None = None,
        *,
        fetch: bool = True,
        clip: float | None = None,
        remember: bool = False,
    ) -> Report:
        """Train the model from these values on, on the worker.

        Args:
            state: values to begin with.
            terms: what is added to the loss.
            round: from 1.
            strategy: tells what is wanted back.
            progress: told of each batch.
            fetch: whether what came of it is brought here.
            clip: L2 norm to which the change is clipped, before it is brought here.
            remember: whether the next model may be what came of it, which is then not sent again.

        Raises:
            UpdateRejected: what came cannot be made a model of.
            WsfedError: the worker is lost, or an operation failed there.
        """
        begun = time.perf_counter()
        async with self._turns:
            issued = await self._issue(state, terms, round, strategy, fetch=fetch, clip=clip)
            # The session is in order: the next site can be told what to do, where this one leaves
            # nothing here that is not settled yet (an optimizer's counts, gradients to ask for).
            if strategy.wants_gradients or self._replica.optimizer.state:
                await self._finish(issued, strategy, progress, fetch=fetch)
        if issued.losses is None:
            await self._finish(issued, strategy, progress, fetch=fetch)
        issued.values = await self._values(issued, state, round)
        if remember and fetch and not (strategy.wants_gradients or self._replica.compresses):
            left = await asyncio.to_thread(digests_of, issued.values)
            self._replica.remember(left, issued.turn)
        return await self._report(issued, time.perf_counter() - begun)

    async def _issue(
        self,
        state: State,
        terms: LocalTerms,
        round: int,
        strategy: Strategy,
        *,
        fetch: bool,
        clip: float | None,
    ) -> _Issued:
        replica = self._replica
        replica.give(state, terms)
        if self._recipe.dpsgd is None:
            self.worker.manual_seed(self._recipe.draws(self.name, round))
        else:
            self.worker.seed()
        loss_before = await self._loss_of_rows() if strategy.wants_loss_before else None
        replica.model.train()
        if strategy.wants_gradients:
            run = self._dataset.run(replica.slope(self.rows), **self._whole())
            return _Issued(run, replica.turn, loss_before=loss_before)
        run = self._dataset.run(replica.step, **self._batches(round))
        if replica.rules is not None and fetch:
            released = replica.ask_release(math.inf if clip is None else clip)
            return _Issued(run, replica.turn, released)
        within = None if clip is None else replica.clip(clip)
        asked = replica.ask(self._residual) if fetch else None
        return _Issued(run, replica.turn, asked, within, loss_before)

    async def _finish(
        self,
        issued: _Issued,
        strategy: Strategy,
        progress: Callable[[str, Any], None] | None,
        *,
        fetch: bool,
    ) -> None:
        """Wait for what was issued."""
        asked = None if issued.asked is None else issued.asked.values
        issued.losses = await _finished(issued.run, asked, self.name, progress)
        if fetch and strategy.wants_gradients:
            issued.asked = self._replica.ask_slope()
        if issued.asked is not None:
            issued.told = await issued.asked.values

    async def _values(self, issued: _Issued, state: State, round: int) -> State:
        """Of the model, from what has come."""
        if issued.asked is None:
            return {}
        told, issued.told = issued.told, ()
        try:
            if not self._replica.compresses:
                return self._replica.named(told, state)
            return await asyncio.to_thread(self._replica.named, told, state)
        except ValueError as error:
            raise UpdateRejected(round, self.name, str(error)) from None

    async def _report(self, issued: _Issued, seconds: float) -> Report:
        assert issued.losses is not None
        assert issued.values is not None
        reply = Reply(
            self.name,
            issued.values,
            self.rows,
            steps=len(issued.losses),
            loss_before=issued.loss_before,
            within=None if issued.within is None else bool(await issued.within),
        )
        if self._recipe.dpsgd is None:
            loss = self._mean(issued.losses, self.rows)
        else:
            loss = float(issued.losses.mean())
        residual = None if issued.asked is None else issued.asked.residual
        return Report(reply, loss, seconds, *self._replica.take_traffic(), residual)

    def keep(self, report: Report) -> None:
        """This was used: the next round adds what was not sent of it."""
        self._residual = report.residual

    def contributor(self, strategy: Strategy) -> Contributor:
        """As a member of a round of secure aggregation, once it has trained."""
        link, name, replica = link_of(self.worker), self._dataset.name, self._replica

        def ask(step: int, told: bytes) -> Awaitable[torch.Tensor]:
            values, given = replica.secure_ids(step, gradients=strategy.wants_gradients)
            said = torch.frombuffer(bytearray(told or b"\0"), dtype=torch.uint8)
            made: Awaitable[torch.Tensor] = link.ask(
                lambda number: m.SecAgg(number, step, name, values, given, 0).wire(), tensor=said
            )
            return made

        member = self.worker.info.get("secagg")
        if member is None:
            raise FederatedError(
                f"worker {self.worker.id!r} is no member of a roster: start it with one"
            )
        return Contributor(str(member), self.rows, ask)

    async def judge(self, state: State) -> dict[str, float]:
        """Loss and metrics over the rows to evaluate on, weighted by rows.

        Raises:
            WsfedError: the worker is lost, or an operation failed there.
        """
        async with self._turns:
            self._replica.give(state, LocalTerms())
            return await self._judged(self._validation)

    async def _loss_of_rows(self) -> float:
        return (await self._judged(self._dataset))["loss"]

    async def _judged(self, dataset: Any) -> dict[str, float]:
        self._replica.model.eval()
        size = min(len(dataset), max(self._recipe.batch_size or len(dataset), 256))
        found: Mapping[str, torch.Tensor] = await dataset.run(
            self._replica.judge, batch_size=size, fields=self._recipe.fields
        )
        return {name: self._mean(values, len(dataset), size) for name, values in found.items()}

    def _batches(self, round: int) -> dict[str, Any]:
        recipe = self._recipe
        if recipe.dpsgd is not None:
            sampling = recipe.sampling(self.rows)
            return {
                "sample_rate": sampling.rate,
                "steps": sampling.steps,
                "fields": recipe.fields,
            }
        return {
            "batch_size": min(recipe.batch_size or self.rows, self.rows),
            "epochs": recipe.epochs,
            "shuffle": recipe.shuffle,
            "seed": recipe.orders(self.name, round),
            "drop_last": recipe.drop_last,
            "fields": recipe.fields,
        }

    def _whole(self) -> dict[str, Any]:
        size = min(self._recipe.batch_size or self.rows, self.rows)
        return {"batch_size": size, "fields": self._recipe.fields}

    def _mean(self, values: torch.Tensor, rows: int, size: int | None = None) -> float:
        """Over batches, weighted by their rows."""
        size = min(size or self._recipe.batch_size or rows, rows)
        each = [size] * (rows // size) + ([rows % size] if rows % size else [])
        weights = torch.tensor(each * -(-len(values) // len(each)), dtype=torch.float64)
        weights = weights[: len(values)]
        return float((values * weights).sum() / weights.sum())


async def _finished(
    run: Any, asked: Any, name: str, progress: Callable[[str, Any], None] | None
) -> torch.Tensor:
    """The losses of a run; if it fails, nobody asks for its values."""
    try:
        if progress is not None:
            async for each in run:
                progress(name, each)
        losses: torch.Tensor = await run
    except BaseException:
        if asked is not None:
            asked.cancel()
        raise
    return losses
