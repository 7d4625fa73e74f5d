"""What is set for secure aggregation, and a member as training reaches it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from wsfed.federated.state import state_of
from wsfed.privacy.structure import structure_of

if TYPE_CHECKING:  # needs cryptography, which is optional
    from wsfed.privacy.roster import Roster

__all__ = ["Contributor", "SecAgg", "arch_hash"]


@dataclass(frozen=True, slots=True)
class SecAgg:
    """That replies are added up by ``wsfed-secagg/1``, so that nobody sees a single one.

    Attributes:
        roster: of the members: the workers, by the ids that they have in it.
        attempts: at a round, each with new keys.
        patience: seconds for each of the protocol's six steps.
    """

    roster: Roster
    attempts: int = 2
    patience: float = 60.0

    @property
    def told(self) -> str:
        """For people, and for checkpoints."""
        return f"SecAgg({self.roster.id!r}, bound={self.roster.bound})"

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.patience > 0:
            raise ValueError(f"out of range: attempts {self.attempts}, patience {self.patience}")


def arch_hash(model: nn.Module) -> str:
    """Structure of a model as members of a roster can pin it (``Roster.arch_hash``).

    Of dtypes and shapes of what travels in a round: parameters that require grad, and buffers that
    are saved, in the order of the state_dict.
    """
    return structure_of(list(state_of(model).values()))


@dataclass(frozen=True, slots=True)
class Contributor:
    """A member as the collector reaches it.

    Attributes:
        name: in the roster.
        rows: of its data set.
        ask: takes one step there: ``(step, what the collector says) -> tensor``.
    """

    name: str
    rows: int
    ask: Callable[[int, bytes], Awaitable[torch.Tensor]]
