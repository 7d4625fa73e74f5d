"""Fairer federated averaging (Li et al. 2020, *Fair resource allocation in federated learning*,
algorithm 2: q-FedAvg)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.strategy import Memory, Reply, State, Strategy, exact

__all__ = ["QFedAvg"]


class QFedAvg(Strategy):
    """Sites where the model is worse count more, the more so the larger ``q``.

    With ``F_k`` the loss of a site before its training and ``G_k = L * (w - w_k)``::

        w = w - sum(F_k ** q * G_k) / sum(q * F_k ** (q - 1) * ||G_k|| ** 2 + L * F_k ** q)

    Sites count alike, whatever their rows; buffers become their mean, weighted by rows. ``q = 0``
    is the mean of the models.

    Args:
        q: 0 to a few; the paper uses 0.001 to 5.
        lipschitz: ``L``, an estimate of the Lipschitz constant of the gradient: the inverse of the
            sites' learning rate.

    Raises:
        ValueError: ``q`` is negative, or ``lipschitz`` is not positive.
    """

    wants_loss_before = True

    def __init__(self, q: float = 0.1, *, lipschitz: float = 10.0) -> None:
        if not (0 <= q < math.inf and 0 < lipschitz < math.inf):
            raise ValueError(
                f"q must not be negative, lipschitz has to be positive: {q=}, {lipschitz=}"
            )
        self.q, self.lipschitz = q, lipschitz

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """See the class.

        Raises:
            ValueError: a site's loss is not finite.
        """
        trained = [name for name in state if name not in buffers]
        losses = [_loss_of(reply) for reply in replies]
        worst = max(losses)
        factors, total = [], 0.0
        for reply, loss in zip(replies, losses, strict=True):
            # F ** q and q * F ** (q - 1), both divided by the worst loss's power: it cancels.
            power = (loss / worst) ** self.q
            changes = [exact(state[name]) - exact(reply.state[name]) for name in trained]
            square = self.lipschitz**2 * sum(float(e.abs().square().sum()) for e in changes)
            factors.append(power * self.lipschitz)
            total += power * (self.q * square / loss + self.lipschitz)
        following = weighted_mean([each.state for each in replies], [each.rows for each in replies])
        for name in trained:
            value = start = exact(state[name])
            for factor, reply in zip(factors, replies, strict=True):
                value = value - factor / total * (start - exact(reply.state[name]))
            following[name] = value.to(state[name].dtype)
        return following, memory


def _loss_of(reply: Reply) -> float:
    """A positive number, as the authors' code has it."""
    loss = reply.loss_before
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"{reply.site} reports a loss of {loss}, which is not finite")
    return max(loss, 0.0) + 1e-10
