"""What of a model travels between rounds."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["buffers_of", "state_of"]


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
