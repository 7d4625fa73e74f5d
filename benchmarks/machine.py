"""What the benchmarks ran on."""

from __future__ import annotations

import platform
import time

import torch

__all__ = ["machine"]


def machine() -> dict[str, str]:
    """Versions, processor and date."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
