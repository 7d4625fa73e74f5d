"""The coordinate-wise trimmed mean (Yin et al. 2018, *Byzantine-robust distributed learning:
towards optimal statistical rates*, algorithm 1, option II)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction

import torch

from wsfed.federated.strategies.stacking import by_coordinate, check_replies
from wsfed.federated.strategies.strategy import Memory, Reply, State, Strategy

__all__ = ["FedTrimmedAvg"]


class FedTrimmedAvg(Strategy):
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

    tolerates_garbage = True

    def __init__(self, beta: float = 0.2) -> None:
        if not 0 <= beta < 0.5:
            raise ValueError(f"beta has to be in [0, 0.5): {beta}")
        self.beta = beta

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """See the class; buffers become their trimmed mean.

        Raises:
            ValueError: there are no replies, or one does not fit the model.
        """
        check_replies(self, state, replies)
        return by_coordinate(state, replies, self._trimmed_mean), memory

    def _trimmed_mean(self, ordered: torch.Tensor) -> torch.Tensor:
        count = len(ordered)
        share = Fraction(str(float(self.beta)))  # as written: 0.29 * 100 is less than 29 in floats
        dropped = math.floor(share * count)
        return ordered[dropped : count - dropped].mean(dim=0)
