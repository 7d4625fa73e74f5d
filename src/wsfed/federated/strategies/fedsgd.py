"""Gradient averaging (McMahan et al. 2017, section 2: FederatedSGD)."""

from __future__ import annotations

from functools import partial

import torch

from wsfed.federated.strategies.fedopt import FedOpt, ServerOptimizer
from wsfed.federated.strategies.strategy import MeanStrategy, Memory, State

__all__ = ["FedSGD"]


class FedSGD(MeanStrategy):
    """Sites report gradients over all of their rows, and the server takes one step with the mean.

    With every site taking part a round is one step of gradient descent over all rows. Buffers
    become the mean of those that the sites' forward passes left.

    Args:
        lr: learning rate of plain gradient descent.
        optimizer: another optimizer of torch's for the server's step, in place of ``lr``.
    """

    wants_gradients = True

    def __init__(self, lr: float = 0.1, *, optimizer: ServerOptimizer | None = None) -> None:
        self._server = FedOpt(optimizer or partial(torch.optim.SGD, lr=lr))

    def step(self, state: State, memory: Memory, mean: State) -> tuple[State, Memory]:
        """One step with the mean gradient: ``w - lr * g`` for plain gradient descent."""
        return self._server.descend(state, memory, mean)  # the mean of the gradients
