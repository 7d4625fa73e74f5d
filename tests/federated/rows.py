"""Rows that the tests of federated training are about: points above and below a plane."""

from __future__ import annotations

import torch

__all__ = ["points"]


def points(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """``x`` (float32 [rows, 4]) and ``y`` (int64 [rows]), the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return {"x": x, "y": (x.sum(1) > 0).long()}
