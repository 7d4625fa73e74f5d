"""What is set for secure aggregation, and a member as training reaches it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # needs cryptography, which is optional
    from wsfed.privacy.roster import Roster

__all__ = ["Contributor", "SecAgg"]


@dataclass(frozen=True, slots=True)
class SecAgg:
    """That replies are added up by ``wsfed-secagg/1``, so that nobody sees a single one.

    Attributes:
        roster: of the members: the workers, by the ids that they have in it.
        attempts: at a round, each with new keys.
        patience: seconds for each of the protocol's five steps.
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
