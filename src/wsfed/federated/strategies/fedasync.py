"""Updates mixed in as they come (Xie et al. 2019, *Asynchronous federated optimization*)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from wsfed.federated.averaging import Mean
from wsfed.federated.strategies.strategy import Memory, Reply, State, Strategy

__all__ = ["FedAsync"]


class FedAsync(Strategy):
    """Each update is mixed in alone.

    ``w = (1 - a) * w + a * w_k`` with ``a = alpha * (staleness + 1) ** -exponent``, the paper's
    polynomial case. Of several updates at once each is mixed in after the other.

    Args:
        alpha: weight of a fresh update, in (0, 1].
        exponent: how fast old ones lose weight; 0: not at all.

    Raises:
        ValueError: ``alpha`` is not in (0, 1], or ``exponent`` is negative.
    """

    def __init__(self, alpha: float = 0.6, exponent: float = 0.5) -> None:
        if not (0 < alpha <= 1 and 0 <= exponent < math.inf):
            raise ValueError(
                f"alpha has to be in (0, 1], exponent not negative: {alpha=}, {exponent=}"
            )
        self.alpha, self.exponent = alpha, exponent

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """See the class."""
        for reply in replies:
            mixed = Mean()
            share = self.alpha * (reply.staleness + 1) ** -self.exponent
            mixed.add(state, 1 - share)
            mixed.add(reply.state, share)
            state = mixed.result()
        return state, memory
