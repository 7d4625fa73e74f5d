"""The geometric median (Pillutla et al. 2022, *Robust aggregation for federated learning*,
algorithm 2: the smoothed Weiszfeld algorithm)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.stacking import RobustStrategy, measured, squared_distances, stack
from wsfed.federated.strategies.strategy import Reply, State

__all__ = ["GeometricMedian"]


class GeometricMedian(RobustStrategy):
    """The next model has the least mean distance to the sites', weighted by their rows.

    With ``a_k`` the share of a site in the rows, it repeats::

        v = sum(b_k * w_k) / sum(b_k)
        b_k = a_k / max(smooth, ||v - w_k||)

    The first ``b_k`` is ``a_k / max(smooth, r_k)``, where the sites within ``r_k`` of ``w_k`` have
    more than half of the rows. (From the mean, garbage that is large enough is still in it after
    any number of steps; where it ends is the same, as the mean distance is convex.)

    Distances are over all entries together, buffers included, but for integers and flags; these
    become the mean with the last ``b_k``, rounded. It is near the honest sites' models as long as
    others have less than half of the rows. Sites say themselves how many rows they have: one that
    lies can claim any weight. Replies that are not finite do not count.

    Args:
        tolerance: it stops when the gradient of the mean distance, which is at most 1, is no longer
            than that.
        most: steps after which it stops in any case.
        smooth: ``nu``: distances below count as that.

    Raises:
        ValueError: ``tolerance`` is negative, or ``most`` or ``smooth`` is not positive.
    """

    def __init__(self, tolerance: float = 1e-6, most: int = 100, smooth: float = 1e-6) -> None:
        if not (0 <= tolerance < math.inf and most >= 1 and 0 < smooth < math.inf):
            raise ValueError(
                "tolerance must not be negative, most and smooth have to be positive: "
                f"{tolerance=}, {most=}, {smooth=}"
            )
        self.tolerance, self.most, self.smooth = tolerance, most, smooth

    def combine(self, state: State, replies: Sequence[Reply]) -> State:
        """See the class; buffers are dealt with alike."""
        counted = [reply for reply in replies if reply.rows > 0 and _is_finite(reply)]
        if not counted:
            raise ValueError(f"none of {len(replies)} replies is finite and has rows")
        points = [stack(counted, name).cpu() for name in measured(state)]
        rows = torch.tensor([float(reply.rows) for reply in counted], dtype=torch.float64)
        weights = rows / rows.sum()
        pulls = weights / _radii(squared_distances(counted).sqrt(), weights).clamp(min=self.smooth)
        shares = self._shares(points, weights, pulls / pulls.sum())
        return weighted_mean([reply.state for reply in counted], shares.tolist())

    def _shares(
        self, points: Sequence[torch.Tensor], weights: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Of each reply in the geometric median, which is a mean of them; from a first guess."""
        for _ in range(self.most):
            pulls = weights / _distances(points, shares).clamp(min=self.smooth)
            following = pulls / pulls.sum()
            gradient = _length(points, following - shares) * pulls.sum()  # as v' = v - g / sum(b)
            shares = following
            if gradient <= self.tolerance:
                break
        return shares


def _is_finite(reply: Reply) -> bool:
    """Whether distances between means of such replies are finite."""
    entries = (stack([reply], name) for name in measured(reply.state))
    return math.isfinite(sum(float((2 * entry).square().sum()) for entry in entries))


def _radii(distances: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How far from each reply one has to go until more than half of the weight is within."""
    ordered, order = distances.sort(dim=1)
    within = weights[order].cumsum(dim=1) > 0.5
    return ordered.gather(1, within.int().argmax(dim=1, keepdim=True)).squeeze(1)


def _distances(points: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """From each reply to the mean of them."""
    squares = torch.zeros_like(shares)
    for each in points:
        squares += (each - shares @ each).square().sum(dim=1)
    return squares.sqrt()


def _length(points: Sequence[torch.Tensor], shares: torch.Tensor) -> float:
    return math.sqrt(sum(float((shares @ each).square().sum()) for each in points))
