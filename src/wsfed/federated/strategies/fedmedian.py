"""The coordinate-wise median (Yin et al. 2018, *Byzantine-robust distributed learning: towards
optimal statistical rates*, algorithm 1, option I)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wsfed.federated.strategies.stacking import RobustStrategy, by_coordinate
from wsfed.federated.strategies.strategy import Reply, State

__all__ = ["FedMedian", "median"]


def median(ordered: torch.Tensor) -> torch.Tensor:
    """The middle row, or the mean of the two middle ones.

    Args:
        ordered: ``[rows, coordinates]``, sorted along the rows.
    """
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


class FedMedian(RobustStrategy):
    """Each coordinate of the next model is the median of the sites'.

    Of an even number it is the mean of the two middle values. It is near the honest sites' values
    as long as less than half of the sites send garbage; NaN is taken for a very large value. Sites
    count alike, whatever their rows: the paper assumes equal sizes.
    """

    def combine(self, state: State, replies: Sequence[Reply]) -> State:
        """See the class; buffers become their median."""
        return by_coordinate(state, replies, median)
