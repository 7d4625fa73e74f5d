"""Gradients by row, beside those of each row alone; here and recorded for a worker."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import nn
from torch.nn import functional as F

import wsfed
from wsfed.errors import FederatedError
from wsfed.federated.per_sample import check_per_sample, per_sample_gradients

ROWS = 5


class Words(nn.Module):
    """Token ids through an embedding and a recurrent layer."""

    def __init__(self, recurrent: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.recurrent = recurrent(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.embedding(x))[0][:, -1])


class Attending(nn.Module):
    """Attention over the positions of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.attention(x, x, x)[0]).mean(1))


class Tied(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.twice(torch.tanh(self.twice(x))))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        lambda: torch.randn(ROWS, 6),
    ),
    "used twice": (Tied, lambda: torch.randn(ROWS, 6)),
    "convolution": (
        lambda: images(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.GroupNorm(2, 6), nn.ReLU()),
        lambda: torch.randn(ROWS, 4, 9, 8),
    ),
    "groups and dilation": (
        lambda: images(nn.Conv2d(4, 8, (3, 2), dilation=(1, 2), groups=2, bias=False)),
        lambda: torch.randn(ROWS, 4, 9, 8),
    ),
    "padding by name": (
        lambda: images(
            nn.Conv2d(4, 6, (5, 3), padding="same"), nn.Conv2d(6, 5, 2, padding="valid")
        ),
        lambda: torch.randn(ROWS, 4, 9, 8),
    ),
    "one dimension": (
        lambda: nn.Sequential(
            *(nn.Conv1d(4, 6, 3, padding=1), nn.InstanceNorm1d(6, affine=True), nn.Tanh()),
            *(nn.Conv1d(6, 6, 3, padding="same"), nn.Flatten(), nn.LazyLinear(3)),
        ),
        lambda: torch.randn(ROWS, 4, 9),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)),
        lambda: torch.randn(ROWS, 6),
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Flatten(), nn.Linear(32, 3)),
        lambda: torch.randn(ROWS, 4, 6),
    ),
    "lstm": (lambda: Words(DPLSTM), lambda: torch.randint(0, 20, (ROWS, 7))),
    "gru": (lambda: Words(DPGRU), lambda: torch.randint(0, 20, (ROWS, 7))),
    "attention": (Attending, lambda: torch.randn(ROWS, 4, 8)),
    "frozen": (
        lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 3)),
        lambda: torch.randn(ROWS, 6),
    ),
}


def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def made(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make, batch = CASES[name]
    model, x = make(), batch()
    model(x)  # what is lazy gets its shape
    check_per_sample(model)
    return model, x, torch.randint(0, 3, (ROWS,))


def alone(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Each row's gradients, from a batch of that row."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    rows = [
        torch.autograd.grad(objective(model, x[n : n + 1], y[n : n + 1]), parameters)
        for n in range(ROWS)
    ]
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", CASES)
async def test_gradients_are_those_of_each_row_alone(name: str) -> None:
    model, x, y = made(name)
    wanted = alone(model, x, y)
    loss, found = per_sample_gradients(model, objective, (x, y))
    torch.testing.assert_close(loss, objective(model, x, y).detach())
    trained = [each for each in model.parameters() if each.requires_grad]
    torch.testing.assert_close([found[each] for each in trained], wanted)
    assert len(found) == len(trained)

    async with wsfed.VirtualWorker("bob") as bob:
        remote = bob.send(copy.deepcopy(model))

        @wsfed.plan
        def recorded(*batch: Any) -> list[torch.Tensor]:
            _, gradients = per_sample_gradients(remote, objective, batch)
            return [gradients[each] for each in remote.parameters() if each.requires_grad]

        given = await wsfed.get(recorded(bob.send(x), bob.send(y)))
    torch.testing.assert_close(list(given), wanted)
    assert all("forward" not in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.BatchNorm1d(4), "BatchNorm"),
        (nn.Conv3d(1, 1, 1), "Conv3d"),
        (nn.Conv1d(1, 1, 1, padding_mode="circular"), "Conv1d"),
        (nn.PReLU(), "PReLU"),
        (nn.LSTM(4, 4), "LSTM"),
    ],
)
def test_layers_without_gradients_by_row_are_named(layer: nn.Module, text: str) -> None:
    with pytest.raises(FederatedError, match=text):
        check_per_sample(nn.Sequential(nn.Linear(4, 4), layer))
