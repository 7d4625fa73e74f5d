"""Rows of one file, cut into the parts of virtual clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wsfed.cli.config import METRICS, Configuration
from wsfed.errors import DatasetError, FederatedError
from wsfed.federated import partition
from wsfed.federated.recipe import seed_of
from wsfed.worker.datasets import Dataset, load

__all__ = ["cut"]


def cut(
    settings: Configuration, base: Path, clients: int | None
) -> tuple[list[Dataset], Callable[[nn.Module], dict[str, float]] | None]:
    """The clients' data sets, and what evaluates on the rows that were held out.

    Args:
        settings: with a simulation.
        base: that paths are relative to.
        clients: in place of the settings' number.

    Raises:
        FederatedError: the rows cannot be cut so.
    """
    section = settings.simulation
    assert section is not None
    seed, count = settings.training.seed, clients or section.clients
    try:
        whole = load("rows", base / section.data)
        order = np.random.default_rng(seed_of(seed, "holdout")).permutation(whole.rows)
        held, kept = np.split(order, [int(section.holdout * whole.rows)])
        parts = _parts(settings, whole, kept, count, seed_of(seed, "partition"))
    except (DatasetError, ValueError, KeyError) as error:
        raise FederatedError(f"[simulation] {error}") from None
    width = len(str(count - 1))
    sets = [
        Dataset(f"client-{number:0{width}}", _rows(whole.fields, kept[part]))
        for number, part in enumerate(parts)
    ]
    return sets, _evaluation(settings, _rows(whole.fields, held)) if len(held) else None


def _rows(fields: Mapping[str, torch.Tensor], index: Any) -> dict[str, torch.Tensor]:
    chosen = torch.from_numpy(index)
    return {name: tensor[chosen] for name, tensor in fields.items()}


def _parts(settings: Configuration, whole: Dataset, kept: Any, count: int, seed: int) -> list[Any]:
    section = settings.simulation
    assert section is not None
    if section.partition == "iid":
        return partition.iid(len(kept), count, seed=seed)
    if section.partition == "quantity_skew":
        return partition.quantity_skew(len(kept), count, alpha=section.alpha, seed=seed)
    if section.labels not in whole.fields:
        raise ValueError(f"there is no field {section.labels!r} to cut by: {list(whole.fields)}")
    labels = whole.fields[section.labels].numpy()[kept]
    if section.partition == "dirichlet":
        return partition.dirichlet(labels, count, alpha=section.alpha, seed=seed)
    return partition.shards(labels, count, per_site=section.per_site, seed=seed)


def _evaluation(
    settings: Configuration, held: Mapping[str, torch.Tensor]
) -> Callable[[nn.Module], dict[str, float]]:
    names = settings.data.fields or list(held)
    batch = [held[name] for name in names]

    def evaluate(model: nn.Module) -> dict[str, float]:
        output = model(batch[0])
        return {
            name: float(METRICS[name](output, *batch[1:])) for name in settings.training.metrics
        }

    return evaluate
