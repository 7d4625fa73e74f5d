"""What differential privacy has cost by now, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from wsfed.errors import PrivacyBudgetSpent
from wsfed.federated.dp import DP
from wsfed.federated.history import Round
from wsfed.federated.recipe import Recipe
from wsfed.federated.sampling import Poisson, Sampler
from wsfed.privacy.mechanism import Mechanism, epsilon_of

__all__ = ["Budget", "Ledger", "ledgers_of"]

#: What a round takes from whom: a sample rate and how many releases of that rate.
Uses: TypeAlias = Mapping[str, tuple[float, int]]


class Budget:
    """What has been spent, by Rényi differential privacy (opacus' accountant).

    Whoever has rows of their own has spent something of their own; the one who has spent most
    counts.

    Args:
        noise: multiplier of each release.
        delta: of the guarantee.
        budget: epsilon that must not be exceeded; ``None`` for no end.

    Raises:
        ImportError: opacus is not installed.
    """

    def __init__(self, noise: float, delta: float, budget: float | None) -> None:
        import opacus.accountants  # noqa: F401  not found out only after the first round

        self._noise, self._delta, self._budget = noise, delta, budget
        self._spent: dict[str, tuple[tuple[float, int], ...]] = {}

    def epsilon(self, uses: Uses | None = None) -> float:
        """Spent so far, and by this besides."""
        after = {**self._spent, **self._after(uses or {})}
        return max(map(self._epsilon, after.values()), default=0.0)

    def _epsilon(self, spent: Sequence[tuple[float, int]]) -> float:
        return epsilon_of([(self._noise, rate, count) for rate, count in spent], self._delta)

    def _after(self, uses: Uses) -> dict[str, tuple[tuple[float, int], ...]]:
        made = {}
        for who, (rate, count) in uses.items():
            *before, (last, times) = self._spent.get(who) or ((rate, 0),)
            same = [(rate, times + count)] if last == rate else [(last, times), (rate, count)]
            made[who] = (*before, *same)
        return made

    def check(self, uses: Uses) -> None:
        """Whether a round that takes this may be made.

        Raises:
            PrivacyBudgetSpent: it would exceed the budget.
        """
        if self._budget is not None and (after := self.epsilon(uses)) > self._budget:
            raise PrivacyBudgetSpent(after, self._delta, self._budget)

    def spend(self, uses: Uses) -> float:
        """Account for a round.

        Args:
            uses: sample rate and number of releases, by whose rows they are of. The rate is the
                probability with which each takes part, by itself (Poisson sampling); 1 for any
                other way of choosing.

        Returns:
            Epsilon so far.
        """
        self._spent.update(self._after(uses))
        return self.epsilon()


@dataclass(frozen=True, slots=True)
class Ledger:
    """A budget, and what a round takes of it.

    Attributes:
        metric: under which epsilon stands in a round's metrics.
        budget: see there.
        uses: what sites of so many rows take, by name.
    """

    metric: str
    budget: Budget
    uses: Callable[[Mapping[str, int]], Uses]

    def replay(self, rounds: Sequence[Round], rows: Mapping[str, int]) -> None:
        """Account for rounds of before; ``rows`` of the sites that are there now."""
        for each in rounds:
            sites = {site.site: site.rows or rows.get(site.site, 1) for site in each.sites}
            self.budget.spend(self.uses(sites))


#: Of a site as a whole, and of the rows of the site whose rows have spent most.
_SITES: Final = "epsilon"
_ROWS: Final = "row_epsilon"


def ledgers_of(dp: DP | None, sampler: Sampler, recipe: Recipe) -> list[Ledger]:
    """The ledgers of a training.

    Raises:
        ImportError: there is one to keep, and opacus is not installed.
    """
    made = []
    if dp is not None:
        rate = sampler.rate if isinstance(sampler, Poisson) else 1.0
        made.append(Ledger(_SITES, _budget(dp), lambda _: {"": (rate, 1)}))
    if recipe.dpsgd is not None:
        made.append(Ledger(_ROWS, _budget(recipe.dpsgd), lambda rows: _steps(recipe, rows)))
    return made


def _budget(settings: Mechanism) -> Budget:
    return Budget(settings.noise, settings.delta, settings.budget)


def _steps(recipe: Recipe, rows: Mapping[str, int]) -> Uses:
    samplings = {site: recipe.sampling(count) for site, count in rows.items()}
    return {site: (each.rate, each.steps) for site, each in samplings.items()}
