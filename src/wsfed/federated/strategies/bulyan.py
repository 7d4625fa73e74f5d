"""Krum, then a trimmed mean around the median (El Mhamdi et al. 2018, *The hidden vulnerability of
distributed learning in Byzantium*, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wsfed.federated.strategies.fedmedian import median
from wsfed.federated.strategies.krum import krum_scores
from wsfed.federated.strategies.stacking import (
    RobustStrategy,
    by_coordinate,
    check_byzantine,
    squared_distances,
)
from wsfed.federated.strategies.strategy import Reply, State

__all__ = ["Bulyan"]


class Bulyan(RobustStrategy):
    """Replies are chosen by Krum, and each coordinate is a mean of those of their middle values.

    Of ``n`` replies ``theta = n - 2 * byzantine`` are chosen one after the other, each the best of
    those that remain (:func:`~wsfed.federated.strategies.krum.krum_scores`; ties go to the first).
    A coordinate of the next model is the mean of the ``theta - 2 * byzantine`` values of it that
    are closest to their median (ties go to the smaller). Unlike Krum alone it bounds what one
    coordinate can be moved by. Sites count alike, whatever their rows: the paper assumes equal
    sizes.

    Args:
        byzantine: ``f``: how many sites may send garbage, of ``4 * byzantine + 3`` or more.

    Raises:
        ValueError: ``byzantine`` is negative or not an integer.
    """

    def __init__(self, byzantine: int) -> None:
        check_byzantine(byzantine)
        self.byzantine = byzantine
        self.min_replies = 4 * byzantine + 3

    def combine(self, state: State, replies: Sequence[Reply]) -> State:
        """See the class; buffers are dealt with alike."""
        chosen = [replies[index] for index in self._choose(squared_distances(replies))]
        return by_coordinate(state, chosen, self._around_the_median)

    def _choose(self, squares: torch.Tensor) -> list[int]:
        left, chosen = list(range(len(squares))), list[int]()
        for _ in range(len(squares) - 2 * self.byzantine):
            scores = krum_scores(squares[left][:, left], self.byzantine)
            chosen.append(left.pop(int(scores.argmin())))
        return chosen

    def _around_the_median(self, ordered: torch.Tensor) -> torch.Tensor:
        distances = (ordered - median(ordered)).abs()
        closest = distances.argsort(dim=0, stable=True)[: len(ordered) - 2 * self.byzantine]
        return ordered.gather(0, closest).mean(dim=0)
