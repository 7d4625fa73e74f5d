"""What of a model travels between rounds."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["buffers_of", "is_finite", "state_of"]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What travels of a model: parameters that require grad, and buffers that are saved.

    What is frozen is sent once, when training begins.
    """
    saved = model.state_dict(keep_vars=True)
    buffers = buffers_of(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    return {name: saved[name] for name in saved if name in trained or name in buffers}


def buffers_of(model: nn.Module) -> frozenset[str]:
    """Names of the buffers among these."""
    saved = model.state_dict(keep_vars=True)
    return frozenset(name for name, _ in model.named_buffers() if name in saved)


def is_finite(value: torch.Tensor) -> bool:
    """Whether all of it is finite; makes no tensor of the same size."""
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point() or not value.numel():
        return True
    least, most = value.aminmax()  # nan, if there is any
    return math.isfinite(float(least)) and math.isfinite(float(most))
