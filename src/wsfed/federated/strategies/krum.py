"""The reply that others are closest to (Blanchard et al. 2017, *Machine learning with adversaries:
Byzantine tolerant gradient descent*, section 4; Multi-Krum is of section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.stacking import RobustStrategy, check_byzantine, squared_distances
from wsfed.federated.strategies.strategy import Reply, State

__all__ = ["Krum", "MultiKrum", "krum_scores"]


def krum_scores(squares: torch.Tensor, byzantine: int) -> torch.Tensor:
    """How far each of ``n`` replies is from others: the smaller, the more it is trusted.

    The score is the sum of the squared distances to the ``n - byzantine - 2`` closest others, but
    to at least one, where there is one.

    Args:
        squares: squared distances, ``[n, n]``.
        byzantine: ``f`` of the paper.
    """
    count = len(squares)
    closest = min(max(count - byzantine - 2, 1), count - 1)
    others = squares.clone().fill_diagonal_(torch.inf)  # not itself
    return others.sort(dim=1).values[:, :closest].sum(dim=1)


class MultiKrum(RobustStrategy):
    """The next model is the mean of the ``keep`` replies with the best :func:`krum_scores`.

    Distances are over all entries together, buffers included, but for integers and flags. Ties go
    to the first. Sites count alike, whatever their rows: the paper assumes equal sizes. What it
    proves needs ``2 * byzantine + 3`` replies, and is proven for a ``keep`` of 1.

    Args:
        byzantine: ``f``: how many sites may send garbage.
        keep: ``m``: how many replies are averaged. At least ``keep + byzantine`` replies are
            needed too, or garbage would be among those kept.

    Raises:
        ValueError: ``byzantine`` is negative, ``keep`` is not positive, or one is not an integer.
    """

    def __init__(self, byzantine: int, keep: int) -> None:
        check_byzantine(byzantine)
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep has to be a positive integer: {keep}")
        self.byzantine, self.keep = byzantine, keep
        self.min_replies = max(2 * byzantine + 3, keep + byzantine)

    def combine(self, state: State, replies: Sequence[Reply]) -> State:
        """See the class; buffers are those of the same replies."""
        scores = krum_scores(squared_distances(replies), self.byzantine)
        best = sorted(scores.argsort(stable=True)[: self.keep].tolist())
        return weighted_mean([replies[each].state for each in best], [1] * len(best))


class Krum(MultiKrum):
    """The next model is the reply with the best score: :class:`MultiKrum` that keeps one.

    Args:
        byzantine: ``f``: how many sites may send garbage, of ``2 * byzantine + 3`` or more.

    Raises:
        ValueError: ``byzantine`` is negative or not an integer.
    """

    def __init__(self, byzantine: int) -> None:
        super().__init__(byzantine, keep=1)
