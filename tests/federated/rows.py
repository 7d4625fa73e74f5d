"""Rows that the tests of federated training are about, and the sites that have them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import torch

import wsfed
from wsfed import federated

__all__ = ["Killed", "KilledAfter", "points", "sites"]


def points(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """``x`` (float32 [rows, 4]) and ``y`` (int64 [rows]), the same ones for the same seed: points
    above and below a plane.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return {"x": x, "y": (x.sum(1) > 0).long()}


@asynccontextmanager
async def sites(
    rows: Mapping[str, int], held_out: Mapping[str, int] | None = None
) -> AsyncIterator[list[wsfed.Worker]]:
    """Virtual workers of these names with so many points, of which each has others.

    Args:
        rows: of the data set ``points``; seeds are 0, 1, 2 …
        held_out: of the data set ``held-out``; seeds are 50, 51 …
    """
    async with AsyncExitStack() as stack:
        made: list[wsfed.Worker] = []
        for number, (name, count) in enumerate(rows.items()):
            datasets = [wsfed.Dataset("points", points(count, number))]
            if held_out is not None:
                datasets.append(wsfed.Dataset("held-out", points(held_out[name], 50 + number)))
            worker = wsfed.VirtualWorker(name, datasets=datasets)
            made.append(await stack.enter_async_context(worker))
        yield made


class Killed(Exception):
    """Instead of a signal."""


class KilledAfter(federated.Callback):
    """Ends the client after so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def round_begins(self, number: int, sites: list[str]) -> None:
        """Whether it is time."""
        if number > self.rounds:
            raise Killed
