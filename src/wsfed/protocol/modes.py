"""The modes that a command runs in, as bits of one number: what a client's context managers say."""

from __future__ import annotations

__all__ = ["ANOMALY", "AUTOCAST", "AUTOCAST_BFLOAT16", "AUTOCAST_FLOAT16", "INFERENCE", "NO_GRAD"]

#: ``torch.no_grad()``.
NO_GRAD = 1
#: ``torch.inference_mode()``.
INFERENCE = 2
#: ``torch.autocast(..., dtype=torch.bfloat16)``, for the worker's device.
AUTOCAST_BFLOAT16 = 4
#: ``torch.autocast(..., dtype=torch.float16)``, for the worker's device.
AUTOCAST_FLOAT16 = 8
#: Either of them.
AUTOCAST = AUTOCAST_BFLOAT16 | AUTOCAST_FLOAT16
#: ``torch.autograd.set_detect_anomaly(True)``: a backward pass looks for what is no number.
ANOMALY = 16
