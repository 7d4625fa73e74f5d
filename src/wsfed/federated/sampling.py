"""Who takes part in a round.

A sampler is called with the candidates of a round and says which of them are asked to train, and
with how many replies the round may close. What it draws depends on the seed, the number of the
round and who the candidates are, not on their order, the time, or what was drawn before: a round
can be repeated.

    sampler = Where(tagged("hospital"), then=Uniform(fraction=0.1, extra=0.3))
    selection = sampler(candidates, round=7, seed=0)
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

__all__ = [
    "Candidate",
    "Everyone",
    "Poisson",
    "Sampler",
    "Selection",
    "Stratified",
    "Uniform",
    "Weighted",
    "Where",
    "tagged",
]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A site that could take part.

    Attributes:
        site: its name, which no other candidate has.
        rows: it has to train on.
        tags: of its data.
        worker: where they are.

    Raises:
        ValueError: fewer rows than none.
    """

    site: str
    rows: int
    tags: frozenset[str] = frozenset()
    worker: str = ""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"site {self.site!r} has 0 rows or more, not {self.rows}")


@dataclass(frozen=True, slots=True)
class Selection:
    """Who was chosen for a round.

    Attributes:
        chosen: their sites, in the order of the candidates. May be empty: the caller decides what a
            round of nobody is.
        wanted: replies with which the round may close. Fewer than were chosen if more were chosen
            than are needed.
        expected: how many are chosen on average, where that is left to chance; else 0.

    Raises:
        ValueError: more are wanted than were chosen, or fewer than none.
    """

    chosen: tuple[str, ...]
    wanted: int
    expected: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.wanted <= len(self.chosen):
            raise ValueError(f"{self.wanted} replies are wanted of {len(self.chosen)} sites")


class Sampler(Protocol):
    """Anything that chooses."""

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """Choose among the candidates.

        Args:
            candidates: whoever could take part, in any order.
            round: number of the round, from 0.
            seed: of the whole training.

        Raises:
            ValueError: two candidates of one name, or a round or seed that is negative.
        """


@dataclass(frozen=True, slots=True)
class Everyone:
    """All candidates take part, and all of them are waited for."""

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """Choose them all."""
        everyone = _by_site(candidates)
        return _selection(candidates, everyone, len(everyone))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quota:
    """How many: either a fraction of the candidates or a count.

    Attributes:
        fraction: of the candidates, 0 to 1, rounded to the nearest number of sites.
        count: sites. If there are fewer, those there are.
        at_least: the fewest that are wanted, whatever the fraction says.
        extra: chosen above those wanted, as a fraction of these, rounded up.
    """

    fraction: float | None = None
    count: int | None = None
    at_least: int = 1
    extra: float = 0.0

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.count is None):
            raise ValueError(
                f"fraction {self.fraction} and count {self.count}: give one of the two"
            )
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"a fraction is 0 to 1, not {self.fraction}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"a count is 1 or more, not {self.count}")
        if self.at_least < 1:
            raise ValueError(f"at_least is 1 or more, not {self.at_least}")
        if self.count is not None and self.count < self.at_least:
            raise ValueError(f"a count of {self.count} is not at least {self.at_least}")
        if not 0 <= self.extra < math.inf:
            raise ValueError(f"extra is 0 or more, and finite, not {self.extra}")

    def _wanted(self, there: int) -> int:
        """Replies wanted from as many candidates."""
        wanted = self.count if self.fraction is None else round(self.fraction * there)
        assert wanted is not None  # __post_init__ saw to it
        return min(max(wanted, self.at_least), there)

    def _chosen(self, wanted: int, there: int) -> int:
        """Sites to choose if as many replies are wanted."""
        # 30 * 0.1 is 3.0000000000000004, which must not become 4.
        return min(wanted + math.ceil(round(wanted * self.extra, 9)), there)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(_Quota):
    """Each candidate is as likely as any other.

    With a fraction C of K candidates this is the ``m = max(C * K, 1)`` of McMahan et al. 2017
    (arXiv:1602.05629, algorithm 1). Choosing more than are wanted, so that slow and lost sites need
    not be waited for, is from Bonawitz et al. 2019 (arXiv:1902.01046), who chose 30 %
    more: ``extra=0.3``.

    Args:
        fraction: of the candidates, 0 to 1, rounded to the nearest number of sites.
        count: sites, instead of a fraction. If there are fewer, those there are.
        at_least: the fewest that are wanted, whatever the fraction says.
        extra: chosen above those wanted, as a fraction of these, rounded up.

    Raises:
        ValueError: both of fraction and count or neither, or a number out of its range.
    """

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """Draw without replacement."""
        pool = _by_site(candidates)
        wanted = self._wanted(len(pool))
        drawn = _draw(_generator(round, seed), pool, self._chosen(wanted, len(pool)))
        return _selection(candidates, drawn, wanted)


@dataclass(frozen=True, slots=True)
class Poisson:
    """Each candidate takes part with the same probability, by itself: how many do is chance.

    Differential privacy counts on this way of choosing (Abadi et al. 2016, arXiv:1607.00133).

    Args:
        rate: the probability.

    Raises:
        ValueError: it is not in (0, 1].
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate has to be in (0, 1]: {self.rate}")

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """One draw for each candidate."""
        pool = _by_site(candidates)
        draws = _generator(round, seed).random(len(pool))
        drawn = [each for each, draw in zip(pool, draws, strict=True) if draw < self.rate]
        selection = _selection(candidates, drawn, len(drawn))
        return replace(selection, expected=self.rate * len(pool))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted(_Quota):
    """A candidate is drawn in proportion to its rows; those without rows never are.

    One is drawn after another without replacement, each in proportion among those left. The mean of
    their models should then not be weighted by rows once more (Li et al. 2020, arXiv:1907.02189;
    their scheme I draws with replacement).

    Args:
        fraction: of the candidates with rows, 0 to 1, rounded to the nearest number of sites.
        count: sites, instead of a fraction. If there are fewer, those there are.
        at_least: the fewest that are wanted, whatever the fraction says.
        extra: chosen above those wanted, as a fraction of these, rounded up.

    Raises:
        ValueError: both of fraction and count or neither, or a number out of its range.
    """

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """Draw without replacement."""
        pool = [candidate for candidate in _by_site(candidates) if candidate.rows]
        wanted = self._wanted(len(pool))
        rows = [candidate.rows for candidate in pool]
        drawn = _draw(_generator(round, seed), pool, self._chosen(wanted, len(pool)), rows)
        return _selection(candidates, drawn, wanted)


@dataclass(frozen=True, slots=True)
class Stratified(_Quota):
    """Each stratum of the candidates gives its share, and within it each is as likely as any other.

    Shares are in proportion to the candidates of a stratum, but every stratum gives ``at_least``
    sites, or all it has. With many strata more may be wanted than the fraction or count says.

    Args:
        key: names the stratum of a candidate, such as its country.
        fraction: of all candidates, 0 to 1, rounded to the nearest number of sites.
        count: sites of all strata together, instead of a fraction.
        at_least: the fewest that are wanted of each stratum.
        extra: chosen above those wanted, as a fraction of these, rounded up in each stratum.

    Raises:
        ValueError: both of fraction and count or neither, or a number out of its range.
    """

    key: Callable[[Candidate], str]

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """Draw without replacement, stratum after stratum in the order of their names."""
        strata: defaultdict[str, list[Candidate]] = defaultdict(list)
        for candidate in _by_site(candidates):
            strata[self.key(candidate)].append(candidate)
        wanted = self._share({name: len(pool) for name, pool in strata.items()})
        rng, drawn = _generator(round, seed), []
        for name, pool in sorted(strata.items()):
            drawn += _draw(rng, pool, self._chosen(wanted[name], len(pool)))
        return _selection(candidates, drawn, sum(wanted.values()))

    def _share(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Replies wanted of each stratum: one after another to whoever lacks most of its quota."""
        there = sum(sizes.values())
        wanted = {name: min(self.at_least, size) for name, size in sorted(sizes.items())}
        total = self._wanted(there)
        for _ in range(sum(wanted.values()), total):
            lacking = {
                name: total * sizes[name] - there * given  # in units of 1 / there: no rounding
                for name, given in wanted.items()
                if given < sizes[name]
            }
            wanted[max(lacking, key=lacking.__getitem__)] += 1
        return wanted


@dataclass(frozen=True, slots=True)
class Where:
    """Only candidates for which a predicate is true, and of them whom another sampler chooses.

    Args:
        predicate: true of those who may take part.
        then: chooses among them.
    """

    predicate: Callable[[Candidate], bool]
    then: Sampler = field(default_factory=Everyone)

    def __call__(self, candidates: Sequence[Candidate], round: int, seed: int) -> Selection:
        """Leave out the others, then choose."""
        return self.then([each for each in candidates if self.predicate(each)], round, seed)


def tagged(tag: str) -> Callable[[Candidate], bool]:
    """A predicate for :class:`Where`: the candidate has this tag."""
    return lambda candidate: tag in candidate.tags


def _by_site(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in the one order that does not depend on who came first."""
    counts = Counter(candidate.site for candidate in candidates)
    for site, count in counts.items():
        if count > 1:
            raise ValueError(f"{count} of {len(candidates)} candidates are called {site!r}")
    return sorted(candidates, key=lambda candidate: candidate.site)


def _generator(round: int, seed: int) -> np.random.Generator:
    if round < 0 or seed < 0:
        raise ValueError(f"round {round} and seed {seed} have to be 0 or more")
    return np.random.default_rng([seed, round])


def _draw(
    rng: np.random.Generator,
    pool: Sequence[Candidate],
    count: int,
    weights: Sequence[int] | None = None,
) -> list[Candidate]:
    """As many of the pool, without replacement; weights are all above 0."""
    if not pool:
        return []  # nothing to draw from is an error to numpy
    p = None if weights is None else np.array(weights, np.float64) / float(sum(weights))
    return [pool[index] for index in rng.choice(len(pool), size=count, replace=False, p=p)]


def _selection(
    candidates: Sequence[Candidate], drawn: Iterable[Candidate], wanted: int
) -> Selection:
    names = {candidate.site for candidate in drawn}
    return Selection(tuple(each.site for each in candidates if each.site in names), wanted)
