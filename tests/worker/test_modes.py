"""Modes of a session: regions of autocast, and a look-out for what is no number."""

from __future__ import annotations

import pytest
import torch

from wsfed.errors import OpNotAllowed
from wsfed.protocol import modes as bits
from wsfed.worker.modes import Modes, watched


def test_gradients_are_recorded_unless_a_mode_says_otherwise() -> None:
    modes = Modes(torch.device("cpu"))
    seen = []
    for mode in (0, bits.NO_GRAD, bits.NO_GRAD | bits.INFERENCE):
        with modes.entered(mode):
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    assert seen == [(True, False), (False, False), (False, True)]


def test_a_region_of_autocast_lasts_while_it_is_asked_for() -> None:
    modes = Modes(torch.device("cpu"))
    with modes.entered(bits.AUTOCAST_BFLOAT16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.is_autocast_enabled("cpu")  # until a command does without
    with modes.entered(bits.AUTOCAST_FLOAT16 | bits.NO_GRAD):
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_grad_enabled()
    with modes.entered(0):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(OpNotAllowed, match="one dtype"), modes.entered(bits.AUTOCAST):
        raise AssertionError


def test_watching_ends_with_the_pass() -> None:
    x = torch.ones(2, requires_grad=True)
    root = torch.sqrt(x * 0 - 1).sum()
    with (
        pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan"),
        watched(bits.ANOMALY, [root]),
    ):
        root.backward(retain_graph=True)
    with watched(0, [root]):
        root.backward()
    assert x.grad is not None
