"""Differential privacy of single rows: DP-SGD on the worker that has them.

Abadi et al. 2016, *Deep learning with differential privacy*: each step takes rows by Poisson
sampling, clips the gradient of each row, and adds Gaussian noise to the sum before the optimizer
sees it. Sampling and noise are drawn on the worker, from its own entropy. What leaves it, update
after update, tells little of any single row, whoever reads it; the reported losses are not covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wsfed.federated.per_sample import per_sample_gradients
from wsfed.privacy.mechanism import Mechanism

__all__ = ["DPSGD", "Sampling", "private_gradients"]


@dataclass(frozen=True, slots=True)
class DPSGD(Mechanism):
    """Clip each row's gradient, add noise to the sum, and account for it.

    Attributes:
        clip: L2 norm to which the gradient of a row is clipped.
        noise: standard deviation of the noise on the sum of a batch, in units of ``clip``.
        delta: of the guarantee; below one over the rows of a site.
        budget: epsilon at which training ends; ``None`` for no end.
    """


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a site takes its rows in a round.

    Attributes:
        rate: probability of a row in a step.
        steps: of the round.
    """

    rate: float
    steps: int

    @classmethod
    def of(cls, rows: int, batch_size: int | None, epochs: int) -> Sampling:
        """Batches of ``batch_size`` rows on average, and as many as so many epochs have."""
        size = min(batch_size or rows, rows)
        return cls(size / rows, epochs * math.ceil(rows / size))


def private_gradients(
    dpsgd: DPSGD,
    model: nn.Module,
    objective: Callable[..., torch.Tensor],
    batch: Sequence[torch.Tensor],
    weights: torch.Tensor,
    expected: int,
) -> torch.Tensor:
    """Set the gradients of a model; gives the loss of the batch.

    ``grad = (sum over rows of w * g * min(1, clip / |g|) + N(0, (noise * clip) ** 2)) / expected``
    (algorithm 1 of the paper), with ``|g|`` the norm over all parameters.

    Args:
        dpsgd: settings.
        model: of layers that :func:`~wsfed.federated.per_sample.check_per_sample` takes.
        objective: ``(model, *batch) -> loss``, the mean over the rows.
        batch: fields, the rows first.
        weights: 1 for rows that count, 0 for others, shape ``[rows]``.
        expected: rows that count on average.
    """
    loss, found = per_sample_gradients(model, objective, batch)
    with torch.no_grad():
        squares = [gradient.flatten(1).square().sum(1) for gradient in found.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (dpsgd.clip / norms.clamp(min=1e-12)).clamp(max=1.0) * weights
        for parameter, gradient in found.items():
            factor = factors.to(gradient.dtype).reshape(-1, *(1 for _ in parameter.shape))
            clipped = (gradient * factor).sum(0)
            noise = torch.randn_like(clipped) * (dpsgd.noise * dpsgd.clip)
            parameter.grad = (clipped + noise) / expected
    return loss
