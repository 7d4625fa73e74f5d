"""The coordinate-wise trimmed mean (Yin et al. 2018, *Byzantine-robust distributed learning:
towards optimal statistical rates*, algorithm 1, option II)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from wsfed.federated.strategies.stacking import RobustStrategy, by_coordinate
from wsfed.federated.strategies.strategy import Reply, State

__all__ = ["FedTrimmedAvg"]


class FedTrimmedAvg(RobustStrategy):
    """Each coordinate of the next model is the mean of the sites' without the extreme values.

    Of ``n`` values the ``floor(beta * n)`` smallest and as many of the largest are dropped. So
    ``beta`` has to be at least the share of sites that send garbage, and of fewer than ``1 / beta``
    replies none is dropped. NaN is taken for a very large value. Sites count alike, whatever their
    rows: the paper assumes equal sizes.

    Args:
        beta: the share that is dropped at either end, in [0, 0.5); 0 is the plain mean.

    Raises:
        ValueError: ``beta`` is not in [0, 0.5).
    """

    def __init__(self, beta: float = 0.2) -> None:
        if not 0 <= beta < 0.5:
            raise ValueError(f"beta has to be in [0, 0.5): {beta}")
        self.beta = beta

    def combine(self, state: State, replies: Sequence[Reply]) -> State:
        """See the class; buffers become their trimmed mean."""
        return by_coordinate(state, replies, self._trimmed_mean)

    def _trimmed_mean(self, ordered: torch.Tensor) -> torch.Tensor:
        count = len(ordered)
        share = Fraction(str(float(self.beta)))  # as written: 0.29 * 100 is less than 29 in floats
        dropped = math.floor(share * count)
        return ordered[dropped : count - dropped].mean(dim=0)
