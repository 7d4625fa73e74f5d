"""Training steps that every system runs: models of ordinary sizes, data made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["EPOCH", "TASKS", "Task", "write_data"]

#: Batches of an epoch.
EPOCH: Final = 10


@dataclass(frozen=True, slots=True)
class Task:
    """A model, a batch, and how many steps a repetition takes.

    Attributes:
        name: as tables show it.
        make: gives the model.
        batch: gives inputs and labels.
        optimizer: gives torch's own for parameters.
        steps: of one repetition.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    steps: int

    def start(self) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        """Model and batch: the same ones each time."""
        torch.manual_seed(0)
        return self.make(), *self.batch()

    @property
    def word(self) -> str:
        """The name as a data set's."""
        return self.name.replace(", ", "-")


def write_data(folder: Path) -> list[str]:
    """Write a data set for each task; gives the options of a worker that offers them."""
    options = []
    for task in TASKS.values():
        batches = [task.start()[1:] for _ in range(EPOCH)]
        x, y = (torch.cat(each).numpy() for each in zip(*batches, strict=True))
        np.savez(folder / f"{task.word}.npz", x=x, y=y)
        options += ["--dataset", f"{task.word}={folder / task.word}.npz"]
    return options


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What is minimised."""
    return F.cross_entropy(model(x), y)


def mlp() -> nn.Module:
    """784-256-128-10."""
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    )


def cnn() -> nn.Module:
    """Two convolutions with batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    )


class Recurrent(nn.Module):
    """An LSTM over 24 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classes from the last output."""
        output, _ = self.layer(x)
        return self.head(output[:, -1])  # type: ignore[no-any-return]


class Attentive(nn.Module):
    """Two encoder layers over 32 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classes from the mean over positions."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def batch_of(*shape: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of this shape, and labels of ten classes."""
    return lambda: (torch.randn(shape), torch.randint(0, 10, shape[:1]))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Without momentum."""
    return torch.optim.SGD(parameters, lr=0.05)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """As torch has it."""
    return torch.optim.Adam(parameters)


_ALL: Final = (
    Task("MLP, SGD", mlp, batch_of(64, 784), sgd, 200),
    Task("MLP, momentum", mlp, batch_of(64, 784), momentum, 200),
    Task("MLP, Adam", mlp, batch_of(64, 784), adam, 100),
    Task("CNN, SGD", cnn, batch_of(32, 1, 28, 28), sgd, 30),
    Task("LSTM, SGD", Recurrent, batch_of(32, 24, 32), sgd, 40),
    Task("transformer, SGD", Attentive, batch_of(16, 32, 64), sgd, 40),
)
#: By name.
TASKS: Final[Mapping[str, Task]] = {task.name: task for task in _ALL}
