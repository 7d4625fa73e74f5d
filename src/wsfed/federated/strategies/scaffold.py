"""Control variates against client drift (Karimireddy et al. 2020, *SCAFFOLD: stochastic controlled
averaging for federated learning*, algorithm 1, option II)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.strategy import LocalTerms, Memory, Reply, State, Strategy

__all__ = ["Scaffold"]


class Scaffold(Strategy):
    """Each step of a site is corrected by ``c - c_k``: where all go, less where this one goes.

    With ``K`` steps of learning rate ``lr`` a site moves from ``w`` to ``w_k``, and then::

        c_k' = c_k - c + (w - w_k) / (K * lr)
        w' = w + server_lr * mean(w_k - w)
        c' = c + sum(c_k' - c_k) / sites

    The sites train with plain ``torch.optim.SGD`` of the same learning rate. Means over sites count
    them alike, as the paper has it; buffers become their mean, weighted by rows. The control
    variates are kept here: a site is sent their difference, and reports nothing but its model.

    Args:
        lr: learning rate of the sites' SGD.
        sites: how many there are, whether or not they take part in a round.
        server_lr: learning rate of the server.

    Raises:
        ValueError: an argument is not positive.
    """

    tolerates_staleness = False

    def __init__(self, lr: float, sites: int, *, server_lr: float = 1.0) -> None:
        if not (lr > 0 and sites > 0 and server_lr > 0):
            raise ValueError(f"they have to be positive: {lr=}, {sites=}, {server_lr=}")
        self.lr, self.sites, self.server_lr = lr, sites, server_lr

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Plain SGD of ``lr``: the control variates divide by it."""
        plain = torch.optim.SGD([torch.zeros(1)], lr=self.lr).defaults
        if type(optimizer) is not torch.optim.SGD or any(
            optimizer.defaults[name] != plain[name]
            for name in ("lr", "momentum", "weight_decay", "nesterov")
        ):
            raise ValueError(
                f"Scaffold(lr={self.lr:g}) is of sites that train with torch.optim.SGD of lr="
                f"{self.lr:g} and nothing else"
            )

    def local_terms(self, memory: Memory, site: str) -> LocalTerms:
        """``c - c_k``, or nothing before the first round."""
        common = _part(memory, "c/")
        own = _part(memory, f"c of {site}/")
        return LocalTerms(correction={name: c - own.get(name, 0) for name, c in common.items()})

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """See the class."""
        trained = [name for name in state if name not in buffers]
        following = weighted_mean([each.state for each in replies], [each.rows for each in replies])
        kept = dict(memory)
        for name in trained:
            value, c = state[name], memory.get(f"c/{name}", torch.zeros_like(state[name]))
            moved, turned = torch.zeros_like(value), torch.zeros_like(value)
            for reply in replies:
                key = f"c of {reply.site}/{name}"
                own = memory.get(key, torch.zeros_like(value))
                kept[key] = own
                if reply.steps:
                    kept[key] = own - c + (value - reply.state[name]) / (reply.steps * self.lr)
                moved += reply.state[name] - value
                turned += kept[key] - own
            following[name] = value + self.server_lr * moved / len(replies)
            kept[f"c/{name}"] = c + turned / self.sites
        return following, kept


def _part(memory: Memory, prefix: str) -> State:
    return {key.removeprefix(prefix): v for key, v in memory.items() if key.startswith(prefix)}
