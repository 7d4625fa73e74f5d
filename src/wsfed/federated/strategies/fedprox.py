"""A proximal term (Li et al. 2020, *Federated optimization in heterogeneous networks*)."""

from __future__ import annotations

import math

from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.strategy import LocalTerms, Memory

__all__ = ["FedProx"]


class FedProx(FedAvg):
    """Federated averaging of sites that minimise ``loss + mu / 2 * ||w - w_t||^2``.

    ``w_t`` is the model that they were given (algorithm 2 of the paper). The term is added for the
    user, on the worker.

    Args:
        mu: how strongly a site is held to the model it was given; 0 is federated averaging.

    Raises:
        ValueError: ``mu`` is negative or not finite.
    """

    def __init__(self, mu: float = 0.01) -> None:
        if not 0 <= mu < math.inf:
            raise ValueError(f"mu has to be finite and not negative: {mu}")
        self.mu = mu

    def local_terms(self, memory: Memory, site: str) -> LocalTerms:
        """The same for every site."""
        return LocalTerms(proximal=self.mu)
