"""How sites train: what fit() is told once and every site is given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from wsfed.errors import FederatedError
from wsfed.federated.dpsgd import DPSGD, Sampling

__all__ = [
    *("Criterion", "LocalOptimizer", "Metric", "Objective", "Recipe", "measure"),
    *("one_number", "seed_of"),
]

#: ``(model, *fields of a batch) -> loss``, a tensor of one element: the mean over the batch.
Objective: TypeAlias = Callable[..., torch.Tensor]
#: ``(output of the model, *fields but the first) -> number``: a mean over the batch.
Metric: TypeAlias = Callable[..., torch.Tensor]
#: Makes an optimizer of parameters: ``partial(torch.optim.SGD, lr=0.1)``.
LocalOptimizer: TypeAlias = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a site trains and evaluates.

    Attributes:
        objective: what is minimised.
        optimizer: makes the sites' optimizer; each round begins with a new one.
        epochs: how often a site goes through its rows in a round.
        batch_size: rows of a step; ``None`` for all.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch that is not full.
        fields: of the data set, in the order in which the objective takes them; ``None`` for all.
        metrics: by name, told beside the loss where a site evaluates.
        seed: of everything that is drawn.
        dpsgd: how single rows are protected; ``None`` for not at all.
    """

    objective: Objective
    optimizer: LocalOptimizer
    epochs: int = 1
    batch_size: int | None = 32
    shuffle: bool = True
    drop_last: bool = False
    fields: Sequence[str] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seed: int = 0
    dpsgd: DPSGD | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"local_epochs has to be at least 1, not {self.epochs}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size has to be at least 1, not {self.batch_size}")
        if not callable(self.objective) or not callable(self.optimizer):
            raise TypeError("loss (or objective) and optimizer are functions")
        if isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                "each site makes an optimizer of its own: give what makes one, such as "
                "functools.partial(torch.optim.SGD, lr=0.1)"
            )

    def orders(self, site: str, round: int) -> int:
        """Seed of the first epoch's order of rows in a round; the next epoch has the next one.

        Args:
            site: whose rows.
            round: from 1.
        """
        return seed_of(self.seed, "order", site) + (round - 1) * self.epochs

    def sampling(self, rows: int) -> Sampling:
        """How a site of so many rows takes them in a round of DP-SGD."""
        return Sampling.of(rows, self.batch_size, self.epochs)

    def draws(self, site: str, round: int) -> int:
        """Seed of what is drawn on the worker in a round: dropout, noise."""
        return seed_of(self.seed, "draw", site, round)


def seed_of(seed: int, *what: object) -> int:
    """A seed of 31 bits for one purpose: the first bytes of SHA-256 of all the words."""
    text = "\0".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class Criterion:
    """The objective of a loss: ``loss(model(first field), *other fields)``.

    Args:
        loss: such as ``torch.nn.functional.cross_entropy``: the mean over a batch.

    Raises:
        TypeError: no function, or one with parameters to train.
    """

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        if not callable(loss):
            raise TypeError(f"a loss is a function, no {type(loss).__name__}")
        if isinstance(loss, type):
            raise TypeError(f"{loss.__name__} is a class: give {loss.__name__}()")
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise TypeError("a loss with parameters belongs into the model: give an objective")
        self.loss = loss

    def __call__(self, model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        return self.loss(model(batch[0]), *batch[1:])


def one_number(loss: torch.Tensor) -> torch.Tensor:
    """A loss, if it is one.

    Raises:
        FederatedError: it is something else than a tensor of one element.
    """
    if not isinstance(loss, torch.Tensor):
        raise FederatedError(f"a loss is a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise FederatedError(
            f"a loss is one number, the mean over a batch, not {list(loss.shape)}: reduce it"
        )
    return loss


def measure(
    recipe: Recipe, model: nn.Module, batch: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Loss and metrics of a batch, by name."""
    objective = recipe.objective
    if not recipe.metrics:
        return {"loss": objective(model, *batch)}
    output = model(batch[0])
    if isinstance(objective, Criterion):
        loss = objective.loss(output, *batch[1:])
    else:
        loss = objective(model, *batch)
    return {"loss": loss} | {k: metric(output, *batch[1:]) for k, metric in recipe.metrics.items()}
