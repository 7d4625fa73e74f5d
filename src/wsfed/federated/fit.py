"""``fit``: train one model over many workers' rows."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from wsfed.errors import BudgetSpent, FederatedError, PrivacyBudgetSpent
from wsfed.federated.budget import Ledger, ledgers_of
from wsfed.federated.callbacks import Callback
from wsfed.federated.checkpoint import Checkpoint, Saved
from wsfed.federated.compression import (
    Cast,
    Compression,
    Quantise,
    TopK,
    check_fits,
    compression_of,
)
from wsfed.federated.contribution import SecAgg
from wsfed.federated.dp import DP
from wsfed.federated.dpsgd import DPSGD
from wsfed.federated.history import History, Round, SiteRound
from wsfed.federated.network import Network, Setup
from wsfed.federated.per_sample import check_per_sample
from wsfed.federated.recipe import Criterion, LocalOptimizer, Metric, Objective, Recipe
from wsfed.federated.rounds import Closing, Rounds
from wsfed.federated.sampling import Everyone, Sampler, Selection
from wsfed.federated.state import buffers_of, is_finite, state_of
from wsfed.federated.strategies.fedasync import FedAsync
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.scaffold import Scaffold
from wsfed.federated.strategies.strategy import MeanStrategy, Strategy

__all__ = ["fit"]

#: What protects sites, or their rows.
Privacy: TypeAlias = SecAgg | DP | DPSGD

_SCHEDULES: Final = ("concurrent", "sequential", "async")


async def fit(
    model: nn.Module,
    workers: Sequence[Any],
    dataset: str,
    loss: Callable[..., torch.Tensor] | None = None,
    optimizer: LocalOptimizer | None = None,
    *,
    rounds: int,
    objective: Objective | None = None,
    local_epochs: int = 1,
    batch_size: int | None = 32,
    shuffle: bool = True,
    drop_last: bool = False,
    fields: Sequence[str] | None = None,
    schedule: Literal["concurrent", "sequential", "async"] = "concurrent",
    strategy: Strategy | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    deadline: float | None = None,
    min_workers: int = 1,
    min_fraction: float = 0.0,
    late: Literal["drop", "keep"] = "drop",
    validation: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    evaluate_every: int = 1,
    callbacks: Sequence[Callback] = (),
    privacy: Privacy | Sequence[Privacy] | None = None,
    compression: str | Cast | Quantise | TopK | Compression | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    resume: bool = False,
) -> History:
    """Train a model over the rows of many workers; the rows never travel.

    In each round sites are given the model, train it on their own rows by a plan that runs there
    (one message for all local epochs), and report its values. What becomes of these is the
    strategy's. With one site, a round is local training, bit for bit.

    Args:
        model: it is trained in place, and is at any time what the last finished round made of it.
        workers: connected ones, which stay open; or what opens a connection
            (``partial(wsfed.connect, url)``), closed in the end, and opened again when it is lost.
        dataset: its name on the workers, or a pattern such as ``"shard-*"``: each that fits is a
            site of its own.
        loss: of ``(output, *fields but the first)``, the mean over a batch. The first field of the
            data set is what the model is given.
        optimizer: makes a site's optimizer of parameters, a new one each round.
        rounds: how many, those of a resumed training included.
        objective: in place of ``loss``: ``(model, *fields) -> loss``.
        local_epochs: how often a site goes through its rows in a round.
        batch_size: rows of a local step; ``None`` for all of a site.
        shuffle: a new order of rows each epoch.
        drop_last: leave out a last batch that is not full.
        fields: of the data set, in order; all by default.
        schedule: ``"concurrent"``: all at once, then a strategy; ``"sequential"``: the model
            travels from site to site; ``"async"``: each site goes on at its own pace, and the
            strategy takes replies as they come.
        strategy: what becomes of replies; ``FedAvg()`` by default, ``FedAsync()`` for ``"async"``.
        sampler: who takes part in a round; everyone by default.
        seed: of all that is drawn: orders of rows, dropout, samples of sites.
        deadline: seconds until a round is closed.
        min_workers: replies (of sites) without which a round fails.
        min_fraction: the same as a share of the replies that were wanted.
        late: what becomes of a site that has not replied when a round is closed: ``"drop"`` stops
            it, with ``"keep"`` it counts in the round in which it replies.
        validation: name of the workers' data set to evaluate on.
        metrics: for ``validation``, by name: ``(output, *fields but the first) -> mean``.
        evaluate: of the model after a round, here: a number, or numbers by name; run in a thread.
        evaluate_every: rounds between evaluations; the last round has one.
        callbacks: told of what happens.
        privacy: ``SecAgg(roster)``: replies are added up by secure aggregation, and nobody sees a
            single one; what sites change is clipped to the roster's ``bound``. ``DP(…)``: what
            sites change is clipped, noise is added to the sum, and the budget is kept.
            ``DPSGD(…)``: the same for single rows, in each local step, on the worker; alone, or
            together with one of the others, as a list.
        compression: of what travels each round. ``"fp16"``, ``"bf16"``: both ways; ``"int8"``,
            ``"int4"``, ``"top-k"`` (:class:`~wsfed.federated.TopK`): of what sites change;
            :class:`~wsfed.federated.Compression` for each way its own. What a worker cannot do is
            refused before the first round.
        checkpoint: a folder, or a :class:`~wsfed.federated.Checkpoint`.
        resume: go on from the newest checkpoint, to the same weights bit for bit; without one,
            begin. What ``TopK`` has kept on workers for later is lost then, as it is with a worker
            that is lost, so its weights are others.

    Returns:
        All rounds, those before a resumption included.

    Raises:
        FederatedError: what is asked for does not fit together, or with the workers' data.
        TooFewSites: a round was closed with fewer replies than it needs.
        UpdateRejected: a site reported values that are not finite.
        RemoteError: an operation failed on a worker.
        PlanError: the loss cannot be recorded.
        ValueError: a setting is out of range.
    """
    strategy = strategy or (FedAsync() if schedule == "async" else FedAvg())
    protection, dpsgd = _privacy(privacy)
    recipe = Recipe(
        _objective(loss, objective),
        _local_optimizer(optimizer, strategy),
        local_epochs,
        batch_size,
        shuffle,
        drop_last,
        fields,
        dict(metrics or {}),
        seed,
        dpsgd,
    )
    _check_settings(model, rounds, schedule, strategy, late, evaluate_every, callbacks)
    sampler = sampler or Everyone()
    if not callable(sampler):
        raise TypeError(f"{sampler!r} is no sampler, such as wsfed.federated.Uniform(fraction=0.1)")
    await asyncio.to_thread(_check_optimizer, recipe, strategy)
    keep = schedule == "async" or late == "keep"
    if keep and not strategy.tolerates_staleness:
        raise ValueError(f"{strategy.name} takes no late replies: schedule={schedule!r}, {late=}")
    if protection is not None:
        _check_private(strategy, schedule, keep, protection)
    if dpsgd is not None:
        await asyncio.to_thread(_check_rows, model, strategy)
    compressed = compression_of(compression)
    if compressed is not None:
        check_fits(compressed, strategy, protection)
    closing = Closing(deadline, min_workers, min_fraction, keep_late=keep)
    saves = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    settings: dict[str, Any] = {"strategy": strategy.name, **strategy.settings}
    settings["schedule"] = schedule
    settings |= {"seed": seed, "local_epochs": local_epochs, "batch_size": batch_size}
    told = protection.told if isinstance(protection, SecAgg) else repr(protection)
    settings["privacy"] = told if dpsgd is None else f"{told}, {dpsgd!r}"
    settings["compression"] = None if compressed is None else repr(compressed)
    begin = await asyncio.to_thread(_begin, model, strategy, saves, settings, resume)
    terms = strategy.local_terms(begin.memory, "")
    corrects = isinstance(strategy, Scaffold)
    setup = Setup(dataset, validation, recipe, terms.proximal, corrects, compressed)
    _set(model, begin.state)
    training = _Training(
        model,
        rounds,
        schedule,
        History(begin.rounds),
        list(callbacks),
        evaluate,
        evaluate_every,
        strategy.min_replies,
        min_workers,
        await asyncio.to_thread(
            ledgers_of, protection if isinstance(protection, DP) else None, sampler, recipe
        ),
    )
    try:
        async with (
            Network(workers, model, setup) as network,
            Rounds(
                network,
                strategy,
                sampler,
                closing,
                begin.state,
                begin.memory,
                buffers_of(model),
                seed=seed,
                progress=training.batch_done if callbacks else None,
                privacy=protection,
            ) as running,
        ):
            del begin  # else its values are held as long as training goes on
            await training.run(network, running, saves, settings)
    except FederatedError as error:
        error.history = training.history
        raise
    return training.history


def _objective(loss: Callable[..., torch.Tensor] | None, objective: Objective | None) -> Objective:
    if (loss is None) == (objective is None):
        raise ValueError("give a loss of outputs, or an objective of the model: one of them")
    if objective is not None:
        return objective
    assert loss is not None
    return Criterion(loss)


def _local_optimizer(optimizer: LocalOptimizer | None, strategy: Strategy) -> LocalOptimizer:
    if optimizer is None and not strategy.wants_gradients:
        raise ValueError(
            "what makes the sites' optimizer is missing: functools.partial(torch.optim.SGD, lr=0.1)"
        )
    return optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.0))


def _check_settings(
    model: nn.Module,
    rounds: int,
    schedule: str,
    strategy: Strategy,
    late: str,
    evaluate_every: int,
    callbacks: Sequence[Callback],
) -> None:
    if not isinstance(strategy, Strategy):
        raise TypeError(f"{strategy!r} is no strategy, such as wsfed.federated.FedAvg()")
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule is one of {', '.join(_SCHEDULES)}, not {schedule!r}")
    if late not in ("drop", "keep"):
        raise ValueError(f"late is 'drop' or 'keep', not {late!r}")
    if rounds < 1 or evaluate_every < 1:
        raise ValueError(f"at least 1 each: {rounds=}, {evaluate_every=}")
    if schedule == "sequential" and type(strategy) is not FedAvg:
        raise ValueError(
            f"nothing is aggregated where the model travels, so {strategy.name} has no use there"
        )
    for each in callbacks:
        if not isinstance(each, Callback):
            raise TypeError(f"{each!r} is no wsfed.federated.Callback")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FederatedError("the model has no parameter that requires grad")


def _check_optimizer(recipe: Recipe, strategy: Strategy) -> None:
    optimizer = recipe.optimizer([torch.zeros(1, requires_grad=True)])
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS asks for losses within a step, which a recorded step cannot")
    if not strategy.wants_gradients:
        strategy.check_optimizer(optimizer)


def _check_private(
    strategy: Strategy, schedule: str, keep_late: bool, privacy: SecAgg | DP
) -> None:
    what = f"privacy={type(privacy).__name__}(…)"
    if not isinstance(strategy, MeanStrategy):
        raise ValueError(f"{what} gives a mean and no single reply, which {strategy.name} needs")
    if schedule != "concurrent" or keep_late:
        raise ValueError(f"{what} is of sites that train at once: concurrent, with late='drop'")
    if isinstance(privacy, DP) and strategy.wants_gradients:
        raise ValueError(f"{what} clips what sites change of a model, and {strategy.name} has none")


def _check_rows(model: nn.Module, strategy: Strategy) -> None:
    if strategy.wants_gradients or strategy.wants_loss_before:
        raise ValueError(
            f"privacy=DPSGD(…) protects rows in local steps, and {strategy.name} is told more of "
            "them"
        )
    check_per_sample(model)


def _privacy(
    given: Privacy | Sequence[Privacy] | None,
) -> tuple[SecAgg | DP | None, DPSGD | None]:
    """What protects sites, and what protects rows."""
    alone = isinstance(given, SecAgg | DP | DPSGD | str)
    each: list[Any] = [] if given is None else [given] if alone else [*given]  # type: ignore[misc]
    sites = [one for one in each if isinstance(one, SecAgg | DP)]
    rows = [one for one in each if isinstance(one, DPSGD)]
    if "secagg" in each:
        raise ValueError("secure aggregation needs its members: privacy=SecAgg(roster)")
    if len(sites) > 1 or len(rows) > 1 or len(sites) + len(rows) < len(each):
        raise ValueError(
            "privacy is SecAgg(…) or DP(…), DPSGD(…), or a list of one of the former and the latter"
        )
    return sites[0] if sites else None, rows[0] if rows else None


def _begin(
    model: nn.Module,
    strategy: Strategy,
    saves: Checkpoint | None,
    settings: Mapping[str, Any],
    resume: bool,
) -> Saved:
    """What the first round begins with."""
    state = {name: value.detach().clone() for name, value in state_of(model).items()}
    for name, value in state.items():
        if not is_finite(value):
            raise FederatedError(f"the model begins with values of {name!r} that are not finite")
    if resume and saves is None:
        raise ValueError("resume=True needs the folder of the checkpoints: checkpoint=…")
    saved = saves.load(settings) if saves is not None else None
    if saved is None:
        return Saved(state, strategy.begin(state), [])
    if not resume:
        assert saves is not None
        raise FederatedError(
            f"{saves.folder} holds a checkpoint of round {len(saved.rounds)}: resume=True "
            "(--resume) goes on from there, and another folder begins anew"
        )
    kinds = {name: (value.shape, value.dtype) for name, value in state.items()}
    if kinds != {name: (value.shape, value.dtype) for name, value in saved.state.items()}:
        raise FederatedError(f"the checkpoint in {saves and saves.folder} is of another model")
    return replace(saved, state={name: saved.state[name] for name in state})


@torch.no_grad()
def _set(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    for name, entry in state_of(model).items():
        entry.copy_(state[name])


@dataclass(slots=True)
class _Training:
    """The course of a training, as far as it is not the sites'."""

    model: nn.Module
    rounds: int
    schedule: str
    history: History
    callbacks: list[Callback]
    evaluate: Callable[[nn.Module], Any] | None
    evaluate_every: int
    at_once: int
    min_sites: int
    ledgers: list[Ledger]

    def batch_done(self, site: str, progress: Any) -> None:
        """A site has finished a batch."""
        for each in self.callbacks:
            each.batch_done(site, progress)

    async def run(
        self,
        network: Network,
        running: Rounds,
        saves: Checkpoint | None,
        settings: Mapping[str, Any],
    ) -> None:
        """The rounds that are left."""
        for ledger in self.ledgers:
            ledger.replay(list(self.history), {site.name: site.rows for site in network.sites})
        for number in range(len(self.history) + 1, self.rounds + 1):
            begun = time.perf_counter()
            if network.lost:
                await network.reopen()
            await network.settle(self.min_sites)
            selection = running.select(number)
            rows = {site.name: site.rows for site in network.sites if site.name in selection.chosen}
            try:
                self._check_budgets(rows)
            except PrivacyBudgetSpent as spent:
                if not self.history:
                    raise
                self.history.stopped = str(spent)
                break
            for each in self.callbacks:
                each.round_begins(number, list(selection.chosen))
            advance = running.sequential if self.schedule == "sequential" else running.concurrent
            try:
                trained = await advance(number, self._narrowed(selection))
            except BudgetSpent as spent:  # a strict worker's own
                if not self.history:
                    raise
                self.history.stopped = str(spent).splitlines()[0]
                break
            await asyncio.to_thread(_set, self.model, running.state)
            metrics, sites = await self._judge(number, running, trained.sites)
            for ledger in self.ledgers:
                uses = ledger.uses(rows)
                metrics[ledger.metric] = await asyncio.to_thread(ledger.budget.spend, uses)
            seconds = time.perf_counter() - begun
            self.history.add(Round(number, trained.loss, metrics, seconds, sites))
            self.history.stopped = await self._told(self.history[-1])
            last = number == self.rounds or bool(self.history.stopped)
            if saves is not None and (last or number % saves.every == 0):
                saved = Saved(running.state, running.memory, list(self.history))
                await asyncio.to_thread(saves.save, saved, settings)
            if self.history.stopped:
                break

    def _check_budgets(self, rows: Mapping[str, int]) -> None:
        for ledger in self.ledgers:
            ledger.budget.check(ledger.uses(rows))

    def _narrowed(self, selection: Selection) -> Selection:
        """Asynchronous rounds close with as many replies as the strategy takes at once."""
        if self.schedule != "async":
            return selection
        return replace(selection, wanted=min(self.at_once, selection.wanted))

    async def _judge(
        self, number: int, running: Rounds, sites: Sequence[SiteRound]
    ) -> tuple[dict[str, float], list[SiteRound]]:
        """Evaluate the new model: numbers of all by name, and the sites with their own."""
        if number % self.evaluate_every and number != self.rounds:
            return {}, list(sites)
        told, each = await running.judge()
        metrics = {"eval_loss" if name == "loss" else name: v for name, v in told.items()}
        if self.evaluate is not None:
            found = await asyncio.to_thread(self._evaluated)
            metrics |= found
        return metrics, [
            replace(site, metrics=each[site.site]) if site.site in each else site for site in sites
        ]

    def _evaluated(self) -> dict[str, float]:
        assert self.evaluate is not None
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                found = self.evaluate(self.model)
        finally:
            self.model.train(was_training)
        named = found if isinstance(found, Mapping) else {"score": found}
        try:
            return {str(name): float(value) for name, value in named.items()}
        except (TypeError, ValueError):
            raise FederatedError(f"evaluate gave {found!r:.200}, no number or numbers") from None

    async def _told(self, round: Round) -> str:
        """Why training is to end now, if a callback says so."""
        told = ""
        for each in self.callbacks:
            reason = each.round_ends(round, self.history)
            if inspect.isawaitable(reason):
                reason = await reason
            told = told or reason or ""
        return told
