"""Round after round: sites are asked to train, and what they report becomes the next model."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from wsfed.errors import FederatedError, TooFewSites, UpdateRejected
from wsfed.federated.averaging import Mean
from wsfed.federated.contribution import SecAgg
from wsfed.federated.dp import CLIP, DP, Noise, follow, release
from wsfed.federated.history import SiteRound
from wsfed.federated.network import LOST, Network
from wsfed.federated.sampling import Sampler, Selection
from wsfed.federated.site import Report, Site
from wsfed.federated.state import is_finite
from wsfed.federated.strategies.strategy import (
    LocalTerms,
    MeanStrategy,
    Memory,
    Reply,
    State,
    Strategy,
    pair_of,
)
from wsfed.tensors import hash_of

if TYPE_CHECKING:
    from wsfed.federated.secure import SecureRounds

__all__ = ["Closing", "Rounds", "Trained"]


@dataclass(frozen=True, slots=True)
class Closing:
    """When a round is closed.

    Attributes:
        deadline: seconds from its beginning; ``None`` to wait for all.
        min_sites: replies that it needs.
        min_fraction: share of the replies that were wanted which it needs.
        keep_late: whether sites that are late go on, and count in the round in which they reply;
            else they are stopped.
    """

    deadline: float | None = None
    min_sites: int = 1
    min_fraction: float = 0.0
    keep_late: bool = False

    def __post_init__(self) -> None:
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline is a number of seconds, not {self.deadline}")
        if self.min_sites < 1 or not 0 <= self.min_fraction <= 1:
            raise ValueError(
                f"min_workers is at least 1, min_fraction between 0 and 1: "
                f"{self.min_sites}, {self.min_fraction}"
            )

    def needed(self, wanted: int) -> int:
        """Replies without which the round fails, of so many that were wanted."""
        return max(self.min_sites, math.ceil(self.min_fraction * wanted))


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a round.

    Attributes:
        loss: of training, weighted by rows.
        sites: what each did.
    """

    loss: float
    sites: list[SiteRound]


#: Bytes of a model that are looked through and added up in less time than a thread takes to begin.
_SMALL: Final = 2**16

#: What came of a site: a report, why it was lost, or an error that ends training.
_Outcome: TypeAlias = Report | str | Exception


@dataclass(slots=True)
class _Work:
    """A site that trains.

    Attributes:
        site: which.
        task: of it.
        since: round in which it was given its model.
        given: that model.
    """

    site: Site
    task: asyncio.Task[_Outcome]
    since: int
    given: State


class Rounds:
    """The model between rounds, and the sites that train; an async context manager.

    Args:
        network: the sites.
        strategy: what becomes of their replies.
        sampler: who takes part.
        closing: when a round ends.
        state: of the model to begin with.
        memory: of the strategy.
        buffers: names of what is not trained.
        seed: of the sampler.
        progress: told of each batch.
        privacy: how what sites report is protected.

    Attributes:
        state: of the model now.
        memory: of the strategy now.
    """

    def __init__(
        self,
        network: Network,
        strategy: Strategy,
        sampler: Sampler,
        closing: Closing,
        state: State,
        memory: Memory,
        buffers: frozenset[str],
        *,
        seed: int,
        progress: Callable[[str, Any], None] | None,
        privacy: SecAgg | DP | None = None,
    ) -> None:
        self._secure = _secure_rounds(privacy) if isinstance(privacy, SecAgg) else None
        self._dp = privacy if isinstance(privacy, DP) else None
        self._noise = Noise()
        self.state, self.memory = state, memory
        self._order = list(state)
        self._network, self._strategy, self._sampler = network, strategy, sampler
        self._closing, self._buffers, self._seed = closing, buffers, seed
        self._progress = progress
        self._working: dict[str, _Work] = {}
        #: Names of sites that have finished: told by each, not looked for among all.
        self._finished: asyncio.Queue[str] = asyncio.Queue()

    async def __aenter__(self) -> Rounds:
        sites = self._network.sites
        for site in sites:
            site.check_rules(self._needs)
        if len(sites) < self._closing.min_sites:
            raise FederatedError(
                f"min_workers={self._closing.min_sites}, and there are {len(sites)} sites"
            )
        if len(sites) < self._strategy.min_replies:
            raise FederatedError(
                f"{self._strategy.name} needs replies of {self._strategy.min_replies} sites, and "
                f"there are {len(sites)}"
            )
        return self

    @property
    def _needs(self) -> str:
        """What needs more of a site than changes of the model."""
        if self._secure is not None:
            return ""
        if self._strategy.wants_gradients or self._strategy.wants_loss_before:
            return self._strategy.name
        if self._dp is not None and self._dp.quantile is not None:
            return "a bound that adapts"
        return "compression" if self._network.compresses else ""

    async def __aexit__(self, *_: object) -> None:
        await self._stop(list(self._working))

    def select(self, number: int) -> Selection:
        """Who takes part in a round."""
        return self._sampler(self._network.candidates, number, self._seed)

    # --- concurrently ---

    async def concurrent(self, number: int, selection: Selection) -> Trained:
        """All sites train at once from the same model on; their replies are aggregated.

        Raises:
            TooFewSites: it has to be closed with too few replies.
            UpdateRejected: a reply cannot be used.
            WsfedError: a site failed in another way than being lost.
        """
        await _aside(self.state, self._network.broadcast.prepare, self.state)
        alone = len(selection.chosen) == 1
        for site in self._sites(selection):
            if site.name not in self._working:
                self._start(site, number, alone)
        replies = _Replies(self._strategy, selection.chosen, alike=self._dp is not None)
        told = await self._collect(number, selection, replies)
        await self._check_enough(number, selection, replies, told)
        before = self.state
        if self._secure is not None:
            told = await self._add_up(number, self._secure, told)
        elif self._dp is not None:
            await asyncio.to_thread(self._add_noise, self._dp, replies, selection)
        else:
            self.state, self.memory = await asyncio.to_thread(
                replies.aggregate, self.state, self.memory, self._buffers
            )
        await _aside(before, _check_made, self._strategy, before, self.state)
        return Trained(_mean_loss(told), told)

    @property
    def clip(self) -> float | None:
        """L2 norm to which changes are clipped now."""
        if self._dp is None:
            return None
        return float(self.memory.get(CLIP, torch.tensor(self._dp.clip, dtype=torch.float64)))

    def _add_noise(self, dp: DP, replies: _Replies, selection: Selection) -> None:
        """What is left of the replies is their sum, with noise."""
        strategy, clip = self._strategy, self.clip
        assert isinstance(strategy, MeanStrategy)
        assert clip is not None
        count = selection.expected or len(selection.chosen)
        sums, within = replies.changes(self.state)
        mean = release(dp, self._noise, clip, self.state, sums, count)
        memory = {name: value for name, value in self.memory.items() if name != CLIP}
        self.state, kept = strategy.conclude(self.state, memory, mean, self._buffers)
        following = follow(dp, self._noise, clip, within, count)
        self.memory = {**kept, CLIP: torch.tensor(following, dtype=torch.float64)}

    async def _add_up(
        self, number: int, secure: SecureRounds, told: Sequence[SiteRound]
    ) -> list[SiteRound]:
        """What is left where replies stay: the mean of them; tells anew what each site did."""
        strategy = self._strategy
        assert isinstance(strategy, MeanStrategy)
        used = {each.site for each in told if each.outcome == "used"}
        sites = {site.name: site.contributor(strategy) for site in self._network.sites}
        contributors = {name: each for name, each in sites.items() if name in used}
        names = [
            name
            for name, value in self.state.items()
            if value.is_floating_point()
            and not (strategy.wants_gradients and name in self._buffers)
        ]
        length = sum(self.state[name].numel() for name in names)
        model = await asyncio.to_thread(hash_of, [self.state[name] for name in self._order])
        made = await secure.mean(number, list(contributors.values()), length, model)
        self.state, self.memory = await asyncio.to_thread(
            self._conclude, strategy, names, made.mean
        )
        lost = {name: made.lost.get(each.name, "") for name, each in contributors.items()}
        return [
            replace(each, outcome=lost[each.site]) if lost.get(each.site) else each for each in told
        ]

    def _conclude(
        self, strategy: MeanStrategy, names: Sequence[str], mean: torch.Tensor
    ) -> tuple[State, Memory]:
        whole, place = dict(self.state), 0
        for name in names:
            value = self.state[name]
            part = mean[place : place + value.numel()].view(value.shape)
            place += value.numel()
            if not strategy.wants_gradients:
                part = value.double() + part
            whole[name] = part.to(value.dtype)
        return strategy.conclude(self.state, self.memory, whole, self._buffers)

    def _sites(self, selection: Selection) -> list[Site]:
        chosen = set(selection.chosen)
        return [site for site in self._network.sites if site.name in chosen]

    def _start(self, site: Site, number: int, alone: bool) -> None:
        terms = self._strategy.local_terms(self.memory, site.name)
        task = asyncio.create_task(self._train(site, self.state, terms, number, remember=alone))
        task.add_done_callback(lambda _: self._finished.put_nowait(site.name))
        self._working[site.name] = _Work(site, task, number, self.state)

    async def _train(
        self, site: Site, state: State, terms: LocalTerms, number: int, *, remember: bool
    ) -> _Outcome:
        try:
            report = await site.train(
                *(state, terms, number, self._strategy, self._progress),
                fetch=self._secure is None,
                clip=self.clip,
                remember=remember,
            )
            if not self._strategy.tolerates_garbage:
                await _aside(report.reply.state, _check, report.reply, number)
        except LOST as error:
            self._network.lose(site.worker, str(error))
            return str(error)
        except Exception as error:
            return error
        return report

    async def _collect(
        self, number: int, selection: Selection, replies: _Replies
    ) -> list[SiteRound]:
        """Wait until the round is to be closed; tells what each site did."""
        ends = None if self._closing.deadline is None else time.monotonic() + self._closing.deadline
        told: list[SiteRound] = []
        while self._working and replies.count < selection.wanted:
            try:
                async with asyncio.timeout(
                    None if ends is None else max(ends - time.monotonic(), 0)
                ):
                    name = await self._finished.get()
            except TimeoutError:
                break
            # Of one that was stopped, and begun again since, there is a word too many.
            if name in self._working and self._working[name].task.done():
                told.append(await self._take(number, name, replies))
        if not self._closing.keep_late:
            enough = replies.count >= selection.wanted
            left_over = list(self._working)
            told += [SiteRound(name, "spare" if enough else "late") for name in left_over]
            await self._stop(left_over)
        # Not as they came: sums of numbers depend on their order.
        places = {name: place for place, name in enumerate(selection.chosen)}
        return sorted(told, key=lambda each: places.get(each.site, len(places)))

    async def _take(self, number: int, name: str, replies: _Replies) -> SiteRound:
        work = self._working.pop(name)
        outcome = work.task.result()
        if isinstance(outcome, Exception):
            await self._stop(list(self._working))
            raise outcome
        if isinstance(outcome, str):
            return SiteRound(name, outcome)
        work.site.keep(outcome)
        staleness = number - work.since
        given = None if work.given is self.state else work.given
        reply = replace(outcome.reply, staleness=staleness, given=given)
        await _aside(reply.state, replies.add, reply)
        return _record(outcome, staleness)

    async def _check_enough(
        self, number: int, selection: Selection, replies: _Replies, told: Sequence[SiteRound]
    ) -> None:
        needed = max(self._closing.needed(selection.wanted), self._strategy.min_replies)
        if replies.count >= needed:
            return
        missing = {each.site: each.outcome for each in told if each.outcome != "used"}
        missing |= dict.fromkeys(self._working, "late")
        missing = {**self._network.lost, **missing}
        await self._stop(list(self._working))
        raise TooFewSites(number, replies.count, needed, missing)

    async def _stop(self, names: Sequence[str]) -> None:
        tasks = [self._working.pop(name).task for name in names]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one after the other ---

    async def sequential(self, number: int, selection: Selection) -> Trained:
        """The model travels: each site goes on from what the one before made of it.

        Raises:
            TooFewSites: too few trained it.
            UpdateRejected: a reply cannot be used.
            WsfedError: a site failed in another way than being lost.
        """
        state, told = self.state, list[SiteRound]()
        for site in self._sites(selection):
            await _aside(state, self._network.broadcast.prepare, state)
            try:
                async with asyncio.timeout(self._closing.deadline):
                    outcome = await self._train(site, state, LocalTerms(), number, remember=True)
            except TimeoutError:
                outcome = "late"
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, str):
                told.append(SiteRound(site.name, outcome))
                continue
            site.keep(outcome)
            state = outcome.reply.state
            told.append(_record(outcome, 0))
        count = sum(each.outcome == "used" for each in told)
        if count < (needed := self._closing.needed(selection.wanted)):
            missing = {each.site: each.outcome for each in told if each.outcome != "used"}
            raise TooFewSites(number, count, needed, {**self._network.lost, **missing})
        self.state = state
        return Trained(_mean_loss(told), told)

    # --- evaluation ---

    async def judge(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Loss and metrics of the model on the sites' rows for that: of all, and of each."""
        sites = [site for site in self._network.sites if site.validation_rows]
        if sites:
            await _aside(self.state, self._network.broadcast.prepare, self.state)
        found = await asyncio.gather(*(self._judge(site) for site in sites))
        each = {
            site.name: told for site, told in zip(sites, found, strict=True) if told is not None
        }
        rows = {site.name: site.validation_rows for site in sites}
        total = sum(rows[name] for name in each)
        names = dict.fromkeys(name for told in each.values() for name in told)
        whole = {
            name: sum(told[name] * rows[site] for site, told in each.items()) / total
            for name in names
        }
        return whole, each

    async def _judge(self, site: Site) -> dict[str, float] | None:
        try:
            return await site.judge(self.state)
        except LOST as error:
            self._network.lose(site.worker, str(error))
            return None


class _Replies:
    """Replies of a round, in the order of the sites, whatever the order in which they come.

    Of a strategy that needs nothing but their mean, they are added up as they come and not kept, as
    soon as those before them are there.
    """

    def __init__(self, strategy: Strategy, order: Sequence[str], *, alike: bool) -> None:
        self._alike = alike
        self._strategy, self._order = strategy, list(order)
        self._mean = Mean(owns=True) if isinstance(strategy, MeanStrategy) else None
        self._waiting: dict[str, Reply] = {}
        self._within: list[bool] = []
        self._next = 0
        self.count = 0

    def add(self, reply: Reply) -> None:
        """One more."""
        self._waiting[reply.site] = reply
        if reply.within is not None:
            self._within.append(reply.within)
        self.count += 1
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._sum_up(self._order[self._next])
            self._next += 1

    def _sum_up(self, site: str) -> None:
        if self._mean is not None and isinstance(self._strategy, MeanStrategy):
            reply = self._waiting.pop(site)
            weight = 1.0 if self._alike else self._strategy.weight(reply.rows)
            try:
                self._mean.add(reply.state, weight)
            except ValueError as error:
                raise FederatedError(f"the reply of {site!r} does not fit: {error}") from None

    def changes(self, state: State) -> tuple[dict[str, torch.Tensor], list[bool]]:
        """The sum of what the sites have changed, and whether each was within the bound."""
        assert self._mean is not None
        for site in list(self._waiting):
            self._sum_up(site)
        mean = self._mean.result()
        sums = {
            name: (mean[name].double() - value.double()) * self.count
            for name, value in state.items()
            if value.is_floating_point()
        }
        return sums, self._within

    def aggregate(
        self, state: State, memory: Memory, buffers: frozenset[str]
    ) -> tuple[State, Memory]:
        """The next model and memory."""
        places = {site: place for place, site in enumerate(self._order)}
        rest = sorted(self._waiting, key=lambda site: (places.get(site, len(places)), site))
        if self._mean is None or not isinstance(self._strategy, MeanStrategy):
            replies = [self._waiting[site] for site in rest]
            return pair_of(
                self._strategy, self._strategy.aggregate(state, memory, replies, buffers)
            )
        for site in rest:
            self._sum_up(site)
        return self._strategy.conclude(state, memory, self._mean.result(), buffers)


def _secure_rounds(secagg: SecAgg) -> SecureRounds:
    from wsfed.federated.secure import SecureRounds  # needs cryptography, which is optional

    return SecureRounds(secagg)


async def _aside(state: State, work: Callable[..., None], *args: Any) -> None:
    """In a thread, where it takes longer than going there."""
    if sum(value.nbytes for value in state.values()) > _SMALL:
        await asyncio.to_thread(work, *args)
    else:
        work(*args)


def _check_made(strategy: Strategy, before: State, made: State) -> None:
    """Whether a strategy has made a model of the same kind, with finite values."""
    kinds, wanted = (
        {name: (value.shape, value.dtype) for name, value in each.items()}
        for each in (made, before)
    )
    if kinds != wanted:
        differ = sorted(
            name for name in kinds.keys() | wanted if kinds.get(name) != wanted.get(name)
        )
        raise FederatedError(
            f"{strategy.name} gave another model: {', '.join(map(repr, differ[:5]))} is missing, "
            "of another shape or dtype, or was not asked for"
        )
    for name, value in made.items():
        if not is_finite(value):
            raise FederatedError(f"{strategy.name} gave values of {name!r} that are not finite")


def _check(reply: Reply, number: int) -> None:
    for name, value in reply.state.items():
        if not is_finite(value):
            bad = int((~value.isfinite()).sum())
            raise UpdateRejected(
                number,
                reply.site,
                f"{bad} of {value.numel()} values of {name!r} are not finite; a smaller learning "
                "rate or clipping may help",
            )


def _record(report: Report, staleness: int) -> SiteRound:
    return SiteRound(
        report.reply.site,
        rows=report.reply.rows,
        steps=report.reply.steps,
        loss=report.loss,
        seconds=report.seconds,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
        staleness=staleness,
    )


def _mean_loss(told: Sequence[SiteRound]) -> float:
    used = [each for each in told if each.outcome == "used"]
    rows = sum(each.rows for each in used)
    return sum(each.loss * each.rows for each in used) / rows if rows else math.nan
