"""Random numbers that nobody can foresee, for noise and for rounding."""

from __future__ import annotations

import secrets

import numpy as np

__all__ = ["unforeseeable"]


def unforeseeable() -> np.random.Generator:
    """Philox, keyed by the machine's entropy."""
    return np.random.Generator(np.random.Philox(secrets.randbits(128)))
