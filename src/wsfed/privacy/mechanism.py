"""The Gaussian mechanism: its settings, and what its uses cost together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Mechanism", "epsilon_of"]


@dataclass(frozen=True, slots=True)
class Mechanism:
    """Clip, and add noise to the sum.

    Attributes:
        clip: L2 norm to which what is summed is clipped.
        noise: standard deviation of the noise, in units of ``clip``.
        delta: of the guarantee.
        budget: epsilon that is not exceeded; ``None`` for no end.

    Raises:
        ValueError: out of range.
    """

    clip: float = 1.0
    noise: float = 1.0
    delta: float = 1e-5
    budget: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.clip < math.inf and 0 < self.noise < math.inf and 0 < self.delta < 1):
            raise ValueError(
                f"clip and noise have to be positive, delta between 0 and 1: clip={self.clip:g}, "
                f"noise={self.noise:g}, delta={self.delta:g}"
            )
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"a budget is positive: {self.budget:g}")


def epsilon_of(uses: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of all uses, by Rényi differential privacy (opacus' accountant).

    Args:
        uses: noise, sample rate, and how often, in their order.
        delta: of the guarantee.

    Raises:
        ImportError: opacus is not installed.
    """
    return _epsilon(tuple(uses), delta)


@lru_cache(maxsize=4096)
def _epsilon(uses: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from opacus.accountants import RDPAccountant

    if not uses:
        return 0.0
    accountant = RDPAccountant()
    accountant.history = list(uses)
    return float(accountant.get_epsilon(delta))
