"""Updates that wait until there are enough of them (Nguyen et al. 2022, *Federated learning with
buffered asynchronous aggregation*)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.strategy import Memory, Reply, State, Strategy, exact

__all__ = ["FedBuff"]


class FedBuff(Strategy):
    """So many updates make one step of the server (algorithm 1 of the paper).

    ``w = w + lr * mean(s_k * (w_k - w_t(k)))`` with ``s_k = (1 + staleness) ** -0.5``, where
    ``w_t(k)`` is the model that the site began with. Buffers become the mean of those reported.

    Args:
        size: updates that make a step, at least.
        lr: learning rate of the server.

    Raises:
        ValueError: ``size`` or ``lr`` is not positive.
    """

    def __init__(self, size: int = 10, *, lr: float = 1.0) -> None:
        if not (size > 0 and lr > 0):
            raise ValueError(f"they have to be positive: {size=}, {lr=}")
        self.size, self.lr = size, lr
        self.min_replies = size

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """See the class."""
        following = weighted_mean([each.state for each in replies], [each.rows for each in replies])
        for name in state:
            if name in buffers:
                continue
            value = exact(state[name])
            for reply in replies:
                given = state if reply.given is None else reply.given
                change = exact(reply.state[name]) - exact(given[name])
                value = value + self.lr / len(replies) * (1 + reply.staleness) ** -0.5 * change
            following[name] = value.to(state[name].dtype)
        return following, memory
