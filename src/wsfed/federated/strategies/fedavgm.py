"""Momentum on the server (Hsu et al. 2019, *Measuring the effects of non-identical data
distribution for federated visual classification*)."""

from __future__ import annotations

from functools import partial

import torch

from wsfed.federated.strategies.fedopt import FedOpt

__all__ = ["FedAvgM"]


class FedAvgM(FedOpt):
    """Federated averaging with momentum on the server (Hsu et al. 2019).

    Args:
        lr: the server's learning rate.
        momentum: of torch's SGD: ``v = momentum * v - D``, ``w = w - lr * v``.
        nesterov: as in ``torch.optim.SGD``.
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.9, *, nesterov: bool = False) -> None:
        self.lr, self.momentum = lr, momentum
        super().__init__(partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov))
