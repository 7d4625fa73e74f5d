"""What a strategy is: pure functions of what the workers report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from wsfed.errors import FederatedError
from wsfed.federated.averaging import weighted_mean

__all__ = [
    *("LocalTerms", "MeanStrategy", "Memory", "Reply", "State", "Strategy"),
    *("exact", "pair_of"),
]

#: Values of a model by name, as ``module.state_dict()`` has them.
State: TypeAlias = Mapping[str, torch.Tensor]
#: What a strategy remembers between rounds, by name; it is part of a checkpoint.
Memory: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reply:
    """What one site reports of a round.

    Attributes:
        site: who.
        state: the values after local training; gradients where the strategy asks for these.
        rows: that it trained on in an epoch.
        steps: of its optimizer.
        staleness: how many times the model has changed since the site was given it.
        given: the model that the site was given, where that is not the present one.
        loss_before: mean loss over its rows of the model that it was given, where the strategy asks
            for it.
        within: whether its change was within the bound to which changes are clipped.
    """

    site: str
    state: State
    rows: int
    steps: int
    staleness: int = 0
    given: State | None = None
    loss_before: float | None = None
    within: bool | None = None


@dataclass(frozen=True, slots=True)
class LocalTerms:
    """What local training adds to the user's loss.

    Attributes:
        proximal: ``mu`` of ``mu / 2 * ||w - w_t||^2``, where ``w_t`` is the model that was given.
        correction: added to the gradients of each step, by name.
    """

    proximal: float = 0.0
    correction: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Strategy(ABC):
    """How replies become the next model. Holds settings only; what changes is ``memory``.

    Attributes:
        wants_gradients: sites report the gradient of the mean loss over their rows at the model
            they were given, and train nothing.
        wants_loss_before: sites also report the loss of the model that they were given.
        tolerates_staleness: a reply may come in a later round than that of the model it began with.
        tolerates_garbage: a reply may hold anything, such as nan; else it ends training.
        min_replies: fewer replies than that cannot be aggregated.
    """

    wants_gradients: bool = False
    wants_loss_before: bool = False
    tolerates_staleness: bool = True
    tolerates_garbage: bool = False
    min_replies: int = 1

    @property
    def name(self) -> str:
        """As histories and configurations call it."""
        return type(self).__name__

    def begin(self, state: State) -> Memory:
        """The memory before the first round.

        Args:
            state: the model that training begins with.
        """
        return {}

    def local_terms(self, memory: Memory, site: str) -> LocalTerms:
        """What a site adds to its local training in this round."""
        return LocalTerms()

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Whether it is one that the sites may train with.

        Raises:
            ValueError: the strategy's formula is of another one.
        """
        return

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        """What it is set to, in numbers and words; a resumed training compares it."""
        return {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}

    @abstractmethod
    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """The next model and memory.

        Args:
            state: the model that the sites were given: what is trained of it, and its buffers.
            memory: as the last round left it.
            replies: at least ``min_replies``, in the order of the sites; all of the same names,
                shapes and dtypes as ``state``.
            buffers: names of the entries that are not trained (running means, counts of batches).
        """


class MeanStrategy(Strategy):
    """A strategy that needs nothing but the mean of the replies, weighted by :meth:`weight`.

    So replies can be added up as they come, and under secure aggregation nobody sees a single one.
    """

    def weight(self, rows: int) -> float:
        """Of a site with so many rows."""
        return float(rows)

    @abstractmethod
    def step(self, state: State, memory: Memory, mean: State) -> tuple[State, Memory]:
        """The next model and memory. Buffers are none of its business: they become their mean.

        Args:
            state: what is trained of the model that the sites were given.
            memory: as the last round left it.
            mean: of the replies, of the same names.
        """

    def conclude(
        self, state: State, memory: Memory, mean: State, buffers: Collection[str] = ()
    ) -> tuple[State, Memory]:
        """The next model and memory, from the mean of all replies.

        Args:
            state: see :meth:`aggregate`.
            memory: see there.
            mean: of everything in the replies.
            buffers: see there.
        """
        before = _without(state, buffers)
        trained, memory = pair_of(self, self.step(before, memory, _without(mean, buffers)))
        if trained.keys() != before.keys():
            odd = ", ".join(sorted(map(repr, trained.keys() ^ before.keys()))[:5])
            raise FederatedError(
                f"step() of {self.name} has to give the names that it was given; not so: {odd}"
            )
        return {**mean, **trained}, memory

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """The next model and memory, from the mean of the replies."""
        weights = [self.weight(reply.rows) for reply in replies]
        mean = weighted_mean([reply.state for reply in replies], weights)
        return self.conclude(state, memory, mean, buffers)


def pair_of(strategy: Strategy, made: tuple[State, Memory]) -> tuple[State, Memory]:
    """What a strategy has given, if that is a model and a memory.

    Raises:
        FederatedError: it is something else.
    """
    given: object = made
    if (
        isinstance(given, tuple)
        and len(given) == 2
        and all(isinstance(each, Mapping) for each in given)
    ):
        return made
    raise FederatedError(
        f"{strategy.name} has to give a model and a memory, two dictionaries, not "
        f"{type(given).__name__}"
    )


def exact(value: torch.Tensor) -> torch.Tensor:
    """In float64, or complex128."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _without(state: State, names: Collection[str]) -> State:
    return {name: value for name, value in state.items() if name not in names}
